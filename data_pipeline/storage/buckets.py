"""What is asked of a bucket, by URL: list, read, write, remove, patiently and checked.

A bucket that fails or does not answer is asked again, ever more slowly, for
$ARIA_JAX_STORAGE_PATIENCE_S seconds (300). Bytes are taken only if they are all that the bucket
has. The clients are fsspec's: gcsfs and s3fs, which find credentials as their clouds' own tools do.
"""

import base64
import hashlib
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import UserError

Answer = TypeVar("Answer")

_CONNECT_S, _SILENCE_S = 20, 60
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 20.0
_BUGS = (TypeError, AttributeError, NameError, AssertionError, LookupError)


@dataclass(frozen=True)
class Object:
    """What a bucket says of an object.

    Attributes:
        size: bytes.
        tag: another one for each version.
        md5: hex, of its bytes; "" where unknown.
    """

    size: int
    tag: str
    md5: str = ""

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "Object":
        """Of what gcsfs or s3fs tell."""
        if "generation" in info:
            md5 = base64.b64decode(info.get("md5Hash", "")).hex()
            return cls(int(info["size"]), str(info["generation"]), md5)
        # An ETag is the md5 of some objects only, and nothing says of which.
        return cls(int(info["size"]), str(info.get("ETag", "")).strip('"'))


class TruncatedError(Exception):
    """Fewer or other bytes came than were sent."""


def listing(where: str) -> dict[str, Object]:
    """The objects at or below a URL, by their names relative to it; "" for the object itself.

    Raises:
        UserError: there is no such bucket, no right to look, or no answer.
    """
    name = where.partition("://")[2]
    try:
        found = _asked("listing", where, lambda: _client(where).find(name, detail=True))
    except FileNotFoundError:
        found = {}
    objects = {
        key[len(name) :].lstrip("/"): Object.from_info(info)
        for key, info in found.items()
        if info.get("type") == "file" and (key == name or key.startswith(name + "/"))
    }
    if not objects:
        check_bucket(where)
    return {key: one for key, one in objects.items() if not key.endswith("/")}


def check_bucket(where: str) -> None:
    """Raises `UserError` where there is no bucket of that name."""
    scheme, _, name = where.partition("://")
    name = name.partition("/")[0]

    def there() -> bool:
        try:
            _client(where).info(name)
        except FileNotFoundError:
            return False
        except OSError as error:
            if not _no_rights(error):
                raise
            return True  # who may read objects may not always ask for the bucket
        return True

    if not _asked("looking for the bucket", where, there):
        raise UserError(f"{where}: there is no bucket {scheme}://{name}, or it is gone by now")


def get(where: str, file: Path, of: Object) -> None:
    """Downloads an object.

    Raises:
        UserError: it is gone, there is no right to read it, or it does not come whole.
    """

    def once() -> None:
        _client(where).get_file(where, str(file))
        size = file.stat().st_size
        if size != of.size:
            raise TruncatedError(f"{size:,} bytes came of {of.size:,}")
        if of.md5:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "md5").hexdigest() != of.md5:
                    raise TruncatedError("other bytes came than the bucket has")

    try:
        _asked("reading", where, once)
    except FileNotFoundError:
        check_bucket(where)
        raise UserError(
            f"{where}: was there and is gone; somebody removes what is being read"
        ) from None


def put(file: Path, where: str) -> Object:
    """Uploads a file, which appears whole or not at all.

    Raises:
        UserError: there is no such bucket, or no right to write there, or it does not arrive.
    """

    def once() -> Object:
        size = file.stat().st_size
        _client(where).put_file(str(file), where)
        sent = Object.from_info(_client(where).info(where))
        if sent.size < size:  # it may have grown while it was read
            raise TruncatedError(f"{sent.size:,} bytes arrived of {size:,}")
        return sent

    try:
        return _asked("writing", where, once)
    except FileNotFoundError as error:
        check_bucket(where)
        raise UserError(f"{where}: writing failed ({_reason(error)})") from error


def delete(where: str) -> None:
    """Removes an object, if it is there."""
    try:
        _asked("removing", where, lambda: _client(where).rm_file(where))
    except FileNotFoundError:
        return


def copy(where: str, to: str) -> None:
    """Copies an object within its storage."""
    _asked("copying", where, lambda: _client(where).cp_file(where, to))


# --- patience ------------------------------------------------------------------------------------


def _asked(doing: str, where: str, call: Callable[[], Answer]) -> Answer:
    """The answer to a request that is made again while the bucket fails.

    Raises:
        FileNotFoundError: there is no such object.
        UserError: the rights are missing, or it failed for too long.
    """
    began, wait = time.monotonic(), _FIRST_WAIT_S
    patience = float(os.environ.get("ARIA_JAX_STORAGE_PATIENCE_S") or 300)
    while True:
        try:
            return call()
        except (UserError, FileNotFoundError, *_BUGS):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno and error.filename:
                raise  # of this disk
            if _no_rights(error):
                raise UserError(
                    f"{where}: {doing} is not allowed for {_credential(where)}; give it that "
                    f"right, or name another credential ({_reason(error)})"
                ) from error
            if time.monotonic() - began > patience:
                raise UserError(
                    f"{where}: {doing} failed for {time.monotonic() - began:.0f} s "
                    f"({_reason(error)}); run the same command again to go on"
                ) from error
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _no_rights(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or str(getattr(error, "code", "")) in ("401", "403")
        or str(error).startswith("Forbidden")
        or type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
    )


def _credential(where: str) -> str:
    """Who asks, as a person knows it."""
    if where.startswith("s3://"):
        from botocore.session import Session

        found = Session().get_credentials()
        if found is None:
            return "nobody (no AWS credentials were found)"
        return f"the AWS access key {found.access_key} (from {found.method})"
    held = getattr(_client(where), "credentials", None)
    email = getattr(getattr(held, "credentials", None), "service_account_email", None)
    if email:
        return f"the service account {email}"
    method = getattr(held, "method", None)
    return "nobody (no Google credentials were found)" if method in (None, "anon") else (
        f"the Google credentials found by {method}"
    )  # fmt: skip


def _client(where: str) -> Any:
    return _client_of(where.partition("://")[0], os.getpid())


@cache
def _client_of(scheme: str, pid: int) -> Any:
    """One for each process: its thread does not live on in a fork."""
    # An experiment that asks each bucket for its kind by gRPC, and waits a minute if that fails.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    settings: dict[str, Any]
    try:
        import aiohttp
        import fsspec

        # Also of the clients that Orbax makes: what another process wrote is to be seen.
        for name in ("gcs", "gs", "s3"):
            fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False

        if scheme == "s3":
            times = {"connect_timeout": _CONNECT_S, "read_timeout": _SILENCE_S}
            settings = {"config_kwargs": {**times, "retries": {"mode": "standard"}}}
        else:
            limits = aiohttp.ClientTimeout(
                total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S
            )
            settings = {"requests_timeout": limits}
        return fsspec.filesystem(scheme, skip_instance_cache=True, **settings)
    except ImportError as error:
        extra = {"gs": "gcs"}.get(scheme, scheme)
        raise UserError(
            f"{scheme}:// needs another package: pip install 'aria-jax[{extra}]' ({error})"
        ) from None
