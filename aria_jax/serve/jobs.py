"""What programs ask for: performances embedded in common batches, continuations as they come."""

import asyncio
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from aria_jax.embed.encode import FixedShapes, PerformanceEncoder
from aria_jax.embed.pieces import midi_slices
from aria_jax.embed.table import pool_slices
from aria_jax.generate.live.engine import Settings
from aria_jax.serve.studio import Studio
from data_pipeline.errors import UserError
from data_pipeline.midi import Performance

WAIT_S = 0.01
"""How long a request for an embedding waits for others to share its batch."""
MAX_SLICES = 64
"""Of a batch."""
MAX_PERFORMANCE_SLICES = 256
MAX_HOLD_S = 2.0
"""How long players may hold up a batch."""


class Batcher:
    """Embeds performances of many requests together."""

    def __init__(self, encoder: PerformanceEncoder) -> None:
        self.encoder = encoder
        self.batches: list[int] = []  # sizes of the latest batches, in requests
        self._queue: queue.Queue[tuple[list[np.ndarray], Future]] = queue.Queue(maxsize=256)
        threading.Thread(target=self._run, name="embed", daemon=True).start()

    def warm(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles everything, where the encoder has fixed shapes."""
        lengths = FixedShapes.up_to(self.encoder.slicing.max_tokens).lengths
        for done, length in enumerate(lengths):
            progress(done, len(lengths))
            self.encoder.encode([np.zeros(min(length, self.encoder.slicing.max_tokens), np.int64)])
        progress(len(lengths), len(lengths))

    def submit(self, performance: Performance) -> "Future[np.ndarray]":
        """The embedding, float32 [E], once it is there.

        Raises:
            UserError: nothing to embed, too long, or too many requests wait.
        """
        slices = midi_slices(performance, self.encoder.slicing)
        if len(slices) > MAX_PERFORMANCE_SLICES:
            raise UserError(f"too long to embed here: more than {MAX_PERFORMANCE_SLICES} slices")
        future: Future[np.ndarray] = Future()
        try:
            self._queue.put_nowait((slices, future))
        except queue.Full:
            raise UserError("too many requests wait for embeddings; try again later") from None
        return future

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            until = time.monotonic() + WAIT_S
            while sum(len(slices) for slices, _ in batch) < MAX_SLICES:
                try:
                    left = max(until - time.monotonic(), 0)
                    batch.append(self._queue.get(timeout=left))
                except queue.Empty:
                    break
            self.batches = [*self.batches[-99:], len(batch)]
            self._encode(batch)

    def _encode(self, batch: Sequence[tuple[list[np.ndarray], Future]]) -> None:
        try:
            rows_NxE = self.encoder.encode([one for slices, _ in batch for one in slices])
        except Exception as error:  # whatever it is, those who wait must hear of it
            for _, future in batch:
                future.set_exception(error)
            return
        at = 0
        for slices, future in batch:
            future.set_result(pool_slices(rows_NxE[at : at + len(slices)], self.encoder.pool))
            at += len(slices)


async def continuation(
    studio: Studio, midi: bytes | None, *, prompt_s: float, settings: Settings, seed: int
) -> AsyncIterator[str] | None:
    """Lines of JSON: {"notes": [...]} as they are played, and {"midi": base64} of all at the end.

    None where all places are taken.

    Args:
        midi: of which the first `prompt_s` seconds are continued; None begins from nothing.
        settings: with a length.

    Raises:
        UserError: the file cannot be continued.
    """
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def send(message: dict[str, Any]) -> None:
        post(loop, lambda: inbox.put_nowait(message))

    def begin() -> None:
        seat = studio.enter(send, None, seed)
        if seat is None:
            send({"type": "full"})
            return
        seat.hurry, seat.session.settings = True, replace(settings)
        if midi is not None:
            studio.load(seat, midi, prompt_s, 0)
        studio.apply(seat, {"type": "hand_over", "t": 0, "lag": 0})

    studio.tell(begin)
    first = await inbox.get()
    if first["type"] == "full":
        return None
    name = first["session"]
    answer = await inbox.get()
    if answer["type"] == "error":
        studio.tell(lambda: studio.leave(name, ""))
        raise UserError(answer["message"])
    return _lines(studio, inbox, name)


async def _lines(
    studio: Studio, inbox: "asyncio.Queue[dict[str, Any]]", name: str
) -> AsyncIterator[str]:
    fields = ("index", "pitch", "velocity", "onset_ms", "duration_ms")
    try:
        while True:
            message = await inbox.get()
            if message["type"] == "notes":
                notes = [dict(zip(fields, note, strict=True)) for note in message["notes"]]
                yield json.dumps({"notes": notes}) + "\n"
            elif message["type"] in ("done", "ended"):
                yield json.dumps({"midi": message.get("midi")}) + "\n"
                return
    finally:
        studio.tell(lambda: studio.leave(name, ""))


def post(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Runs a call in the loop's thread; not where the loop has ended, and its clients with it."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise
