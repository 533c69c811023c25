"""Who may talk to the server, how much and how fast.

By default the server listens to this machine alone, but every page that is open in a browser here
can send it requests: so the Host must be one of its own names (DNS rebinding) and the Origin, where
there is one, the server's own page. At another address a token is needed as well.
"""

import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "aria_jax_token"
MAX_BODY = 2 << 20
"""Bytes of a request."""
RATE, BURST = 50, 300
"""Requests of one address a second; a page with its piano is 30 at once."""
MAX_ADDRESSES = 1000
"""Whose rates are remembered."""
LOCAL = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data:; "
     b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]  # fmt: skip


class Rate:
    """A bucket of `burst` messages, filled with `per_second`."""

    def __init__(
        self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._left, self._since = burst, clock()

    def take(self, n: float = 1) -> bool:
        """Whether there are `n` left, which are gone then."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._since) * self._per_second)
        self._since = now
        if self._left < n:
            return False
        self._left -= n
        return True


class Guard:
    """ASGI middleware: rate of requests, Host, Origin, token, size of bodies.

    Args:
        port: of the server.
        token: that everyone must show; with it any Host is served. None on this machine alone.
        make_rate: of the requests and connections of one address.
    """

    def __init__(
        self,
        app: App,
        *,
        port: int,
        token: str | None = None,
        make_rate: Callable[[], Rate] = lambda: Rate(RATE, BURST),
    ) -> None:
        self.app, self._token, self._make_rate = app, token, make_rate
        self._rates: OrderedDict[str, Rate] = OrderedDict()
        self._hosts = {f"{name}:{port}" for name in LOCAL} | set(LOCAL if port == 80 else ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves what may be served, and refuses the rest."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is not None:
            await _refuse(scope, receive, send, *refused)
            return
        left = MAX_BODY

        async def limited() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    return {"type": "http.disconnect"}
            return message

        async def secured(message: MutableMapping[str, Any]) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                extra = list(_HEADERS)
                if self._token and "token" in _query(scope):
                    cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    extra.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self.app(scope, limited, secured)

    def _rate_of(self, address: str) -> Rate:
        rate = self._rates.pop(address, None) or self._make_rate()
        self._rates[address] = rate
        if len(self._rates) > MAX_ADDRESSES:
            self._rates.popitem(last=False)
        return rate

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason; None where the request may be served."""
        if not self._rate_of((scope.get("client") or ("", 0))[0]).take():
            return 429, "too many requests from this address; wait a second and send fewer"
        headers = {name.lower(): value.decode("latin1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._token is None and host.lower() not in self._hosts:
            return 421, "this server answers to its own name only"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "requests from other pages are not served"
        if self._token is not None and not self._shows_token(scope, headers):
            return 401, "show the token: Authorization: Bearer TOKEN, or ?token=TOKEN"
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length[:12]) > MAX_BODY:
            return 413, f"a request has at most {MAX_BODY} bytes"
        return None

    def _shows_token(self, scope: Scope, headers: dict[bytes, str]) -> bool:
        shown = [*_query(scope).get("token", [])]
        kind, _, value = headers.get(b"authorization", "").partition(" ")
        if kind.lower() == "bearer":
            shown.append(value)
        try:
            cookies = SimpleCookie(headers.get(b"cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if COOKIE in cookies:
            shown.append(cookies[COOKIE].value)
        expected = (self._token or "").encode()
        return any(hmac.compare_digest(one.encode("utf-8", "replace"), expected) for one in shown)


def _query(scope: Scope) -> dict[str, list[str]]:
    try:
        return parse_qs(scope.get("query_string", b"").decode("latin1"), max_num_fields=16)
    except ValueError:
        return {}


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
