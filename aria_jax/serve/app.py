"""The web: the page, the duet's WebSocket, and the models for other programs (see /docs)."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Body, FastAPI, HTTPException, Query, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

from aria_jax.embed.index import has_index
from aria_jax.embed.search import Hit, Searcher, random_similarities, search
from aria_jax.generate.live.engine import Settings
from aria_jax.serve.guard import Guard, Rate
from aria_jax.serve.jobs import Batcher, continuation, post
from aria_jax.serve.seat import MAX_MIDI, Hello, Load, read_message
from aria_jax.serve.studio import Seat, Studio
from data_pipeline.errors import UserError
from data_pipeline.midi import Performance, compat_of, read_midi

WEB = Path(__file__).parent / "web"
HELLO_S = 10
"""In which a connection must say what it wants."""
RATE, BURST = 200, 600
"""Messages of a connection a second: no hands play so many notes."""
MAX_BAD = 50
"""Messages that cannot be read, before the connection is closed."""
OUTBOX = 1000
"""Messages that wait for a slow page, before it is let go."""
MAX_LENGTH_S = 300
Midi = Annotated[bytes, Body(media_type="audio/midi", description="a MIDI file, at most 1 MiB")]


@dataclass
class Models:
    """What a server offers.

    Attributes:
        studio: where duets are played.
        reading: of MIDI files, as the language model's corpus was read.
        batcher: embeds; None without an embedding model.
        embeddings: file to search in; None without.
    """

    studio: Studio
    reading: str
    batcher: Batcher | None = None
    embeddings: Path | None = None


class ContinueRequest(BaseModel):
    """What to continue, and how; `midi` is a MIDI file as base64, none begins from nothing."""

    midi: str | None = Field(None, max_length=4 * MAX_MIDI // 3 + 4)
    prompt_seconds: float = Field(15, gt=0, le=600)
    seconds: float = Field(20, gt=0, le=MAX_LENGTH_S)
    temperature: float = Field(0.98, ge=0.1, le=2)
    min_p: float = Field(0.035, ge=0, le=1)
    density: float = Field(0, ge=-10, le=10)
    seed: int = Field(0, ge=0, lt=2**32)


def make_app(models: Models, *, port: int, **guarded: Any) -> Guard:
    """The ASGI application; it starts the studio, and stops it at the end.

    Args:
        guarded: further arguments of `Guard`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.studio.start()
        yield
        await asyncio.to_thread(models.studio.stop)

    app = FastAPI(
        title="aria-jax",
        description="A duet in the browser, and the models behind it for other programs.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_exception_handler(UserError, _user_error)
    _add_programs(app, models)
    if models.batcher is not None:
        _add_embeddings(app, models, models.batcher)

    @app.websocket("/duet")
    async def duet(socket: WebSocket) -> None:
        await _serve_duet(socket, models.studio)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(WEB / "docs.html")

    app.mount("/", StaticFiles(directory=WEB, html=True))
    return Guard(app, port=port, **guarded)


async def _user_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=422)


def _performance(data: bytes, reading: str) -> Performance:
    if len(data) > MAX_MIDI:
        raise HTTPException(413, f"a MIDI file has at most {MAX_MIDI} bytes here")
    return read_midi(data, compat=compat_of(reading))


def _add_programs(app: FastAPI, models: Models) -> None:
    studio = models.studio
    tokenizer = studio.engine.tokenizer

    @app.get("/v1/info")
    async def info() -> dict[str, Any]:
        """What this server offers."""
        return {
            "model": studio.about,
            "tokenizer": tokenizer.preset_name,
            "players": len(studio.seats),
            "embed": models.batcher is not None,
            "search": models.batcher is not None and models.embeddings is not None,
            "bytes_per_session": studio.engine.bytes_per_session,
        }

    @app.post("/v1/tokenise")
    def tokenise(data: Midi) -> dict[str, Any]:
        """Token ids of a MIDI file (the request's body)."""
        ids = tokenizer.encode(_performance(data, models.reading))
        return {"ids": ids.tolist(), "n_notes": tokenizer.n_notes(ids)}

    @app.post("/v1/continue", response_class=StreamingResponse)
    async def go_on(asked: ContinueRequest) -> StreamingResponse:
        """Continues a performance: lines of JSON with notes as they are played, at last the MIDI
        file. 503 where all places are taken."""
        settings = Settings(
            temperature=asked.temperature,
            min_p=asked.min_p,
            density=asked.density,
            length_ms=int(asked.seconds * 1000),
        )
        lines = await continuation(
            studio,
            None if asked.midi is None else _base64(asked.midi),
            prompt_s=asked.prompt_seconds,
            settings=settings,
            seed=asked.seed,
        )
        if lines is None:
            raise HTTPException(503, "all places are taken; try again later")
        return StreamingResponse(lines, media_type="application/x-ndjson")


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("the MIDI file is no base64") from None


def _add_embeddings(app: FastAPI, models: Models, batcher: Batcher) -> None:
    async def embedded(data: bytes) -> np.ndarray:
        reading = batcher.encoder.slicing.reading
        performance = await asyncio.to_thread(_performance, data, reading)
        return await asyncio.wrap_future(batcher.submit(performance))

    @app.post("/v1/embed")
    async def embed(data: Midi) -> dict[str, Any]:
        """The embedding of a MIDI file (the request's body), as `aria-jax embed` computes it."""
        return {"embedding": (await embedded(data)).tolist()}

    if models.embeddings is None:
        return
    embeddings, one_at_a_time = models.embeddings, asyncio.Lock()
    pairs = random_similarities(embeddings)
    indexed = Searcher(embeddings, "exact") if has_index("exact", embeddings) else None

    async def found(query_E: np.ndarray, k: int) -> list[Hit]:
        if indexed is None:
            return await asyncio.to_thread(search, query_E, embeddings, k)
        async with one_at_a_time:  # it takes all cores, and reads rows of files that are open
            return await asyncio.to_thread(indexed, query_E, k)

    @app.post("/v1/search")
    async def nearest(data: Midi, k: Annotated[int, Query(ge=1, le=100)] = 10) -> dict[str, Any]:
        """The performances nearest to a MIDI file (the request's body) by cosine similarity."""
        hits = await found(await embedded(data), k)
        rows = []
        for hit in hits:
            share = float(np.searchsorted(pairs, hit.score) / max(len(pairs), 1))
            rows.append({**asdict(hit), "quantile": share if len(pairs) else None})
        return {"hits": rows}


# --- the duet ---


async def _serve_duet(socket: WebSocket, studio: Studio) -> None:
    """One connection of a page, from its hello to its end."""
    await socket.accept()
    loop = asyncio.get_running_loop()
    outbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(maxsize=OUTBOX)

    def put(message: dict[str, Any] | None) -> None:
        if outbox.full():
            outbox.get_nowait()
            message = None  # a page that does not listen is let go; its session waits
        outbox.put_nowait(message)

    def send(message: dict[str, Any]) -> None:
        post(loop, lambda: put(message))

    async def deliver() -> None:
        while (message := await outbox.get()) is not None:
            await socket.send_text(json.dumps(message, separators=(",", ":")))
            if message["type"] in ("full", "ended"):
                break
        await socket.close(1013)

    sender = asyncio.create_task(deliver())
    seat: Seat | None = None
    try:
        seat = await _enter(socket, studio, send)
        if seat is not None:
            receiver = asyncio.create_task(_listen(socket, studio, seat, send))
            await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
            receiver.cancel()
    finally:
        if seat is not None:
            studio.tell(partial(studio.lose, seat, send))
        post(loop, lambda: put(None))  # behind what was said last
        await asyncio.wait({sender}, timeout=1.0)
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)


async def _text(socket: WebSocket) -> str | None:
    """The next message, "" for one that is no text; None at the end."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        return None
    return message.get("text") or ""


async def _in_studio(studio: Studio, call: Callable[[], Any]) -> Any:
    """The result of a call in the studio's thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def answer() -> None:
        result = call()
        post(loop, lambda: None if done.done() else done.set_result(result))

    studio.tell(answer)
    return await done


async def _enter(socket: WebSocket, studio: Studio, send: Any) -> Seat | None:
    try:
        async with asyncio.timeout(HELLO_S):
            text = await _text(socket)
        hello = None if text is None else read_message(text)
    except (TimeoutError, UserError):
        hello = None
    if not isinstance(hello, Hello):
        send({"type": "error", "message": "the first message is a hello"})
        return None
    seat = await _in_studio(studio, partial(studio.enter, send, hello.session, hello.seed))
    if seat is None:
        players = len(studio.seats)
        send({"type": "full", "message": f"all {players} places are taken; try again later"})
    return seat


async def _listen(socket: WebSocket, studio: Studio, seat: Seat, send: Any) -> None:
    """Takes messages until the page leaves, or is sent away."""
    rate, bad = Rate(RATE, BURST), 0
    loop = asyncio.get_running_loop()
    while (text := await _text(socket)) is not None:
        heard_at = loop.time()
        if not rate.take():
            send({"type": "error", "message": "too many messages"})
            return
        try:
            message = read_message(text)
            if isinstance(message, Hello):
                raise UserError("there was a hello before")
            data = _base64(message.data) if isinstance(message, Load) else b""
        except UserError as error:
            bad += 1
            if bad > MAX_BAD:
                return
            send({"type": "error", "message": str(error)})
            continue
        if message.type == "bye":
            await _in_studio(studio, partial(studio.leave, seat.name, "goodbye"))
            return
        event = message.model_dump(exclude_none=True)
        studio.tell(partial(_take, studio, seat, event, data, heard_at))


def _take(studio: Studio, seat: Seat, event: dict[str, Any], data: bytes, heard_at: float) -> None:
    """A message of the page; in the studio's thread."""
    if studio.seats.get(seat.name) is not seat:
        return
    if event["type"] == "clock":
        seat.say({"type": "clock", "t": event["t"]})
    event["t"] = seat.hear_clock(event["t"], heard_at)
    lag = event.pop("lag", 0)
    if event["type"] == "load":
        studio.load(seat, data, event["seconds"], event["t"])
    elif event["type"] == "save":
        midi = base64.b64encode(seat.history.midi()).decode()
        seat.say({"type": "midi", "data": midi})
    elif event["type"] != "clock":
        if event["type"] == "hand_over":
            event["lag"] = lag
        studio.apply(seat, event, heard_at)
