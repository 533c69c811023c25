"""A player's place: what the page may say, the session, the clock, and all that was heard."""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from aria_jax.generate.live.session import LiveSession
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, PEDAL, Performance, midi_bytes

MAX_T = 2**31 - 1
MAX_MIDI = 1 << 20
"""Bytes of a MIDI file."""
MAX_MESSAGE = 4 * MAX_MIDI // 3 + 4096
"""Bytes of a message: a MIDI file as base64."""

Time = Annotated[int, Field(ge=0, le=MAX_T)]
Pitch = Annotated[int, Field(ge=21, le=108)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Timed(_Message):
    t: Time


class Hello(_Message):
    """The first message; with the name of a session that goes on."""

    type: Literal["hello"]
    session: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None


class NoteOn(_Timed):
    """A key goes down."""

    type: Literal["note_on"]
    pitch: Pitch
    velocity: Annotated[int, Field(ge=1, le=127)]


class NoteOff(_Timed):
    """A key goes up."""

    type: Literal["note_off"]
    pitch: Pitch


class Pedal(_Timed):
    """The sustain pedal."""

    type: Literal["pedal"]
    value: Annotated[int, Field(ge=0, le=127)]


class SettingsChange(_Timed):
    """Fields of `generate.live.engine.Settings`."""

    type: Literal["settings"]
    temperature: Annotated[float, Field(strict=False)] | None = None
    min_p: Annotated[float, Field(strict=False)] | None = None
    density: Annotated[float, Field(strict=False)] | None = None
    length_ms: int | None = None
    silence_ms: int | None = None


class Choose(_Timed):
    """One of the answers that were offered."""

    type: Literal["choose"]
    take: Annotated[int, Field(ge=0, le=2)]


class Load(_Timed):
    """A MIDI file, as base64, to go on from."""

    type: Literal["load"]
    data: Annotated[str, Field(max_length=MAX_MESSAGE)]
    seconds: Annotated[int, Field(ge=1, le=600)] = 30


class Plain(_Timed):
    """What needs no more than its time; hand_over: `lag`, ms that a message takes one way."""

    type: Literal["hand_over", "take_over", "undo", "takes", "clock", "save", "bye"]
    lag: Annotated[int, Field(ge=0, le=1000)] = 0


Message = Annotated[
    Hello | NoteOn | NoteOff | Pedal | SettingsChange | Choose | Load | Plain,
    Field(discriminator="type"),
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Message)


def read_message(text: str) -> Any:
    """A message as one of the classes here.

    Raises:
        UserError: it is none, or beyond the limits.
    """
    try:
        return _ADAPTER.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "message"
        raise UserError(f"{place}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise UserError("this message is no JSON") from None


JUMP_MS = 2000
"""How far a page's clock may jump ahead, and how late a message may come."""
CLOCKS = 40
"""Messages that the clock is told by: ten seconds of a page that does nothing else."""
Send = Callable[[dict[str, Any]], None]


@dataclass
class History:
    """All that was heard, for the MIDI file: rows of [who, pitch, velocity, start, end].

    Attributes:
        indices: of the model's notes of the latest answer; pedal events, which have one too, are
            no rows.
    """

    rows: list[list[int]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    pedals: list[tuple[int, int]] = field(default_factory=list)

    def end(self, pitch: int, t: int) -> None:
        """The player's key goes up."""
        for row in reversed(self.rows):
            if row[0] == 0 and row[1] == pitch and row[4] < 0:
                row[4] = t
                return

    def without_answer(self, first: int, keep: int = 0) -> None:
        """Drops the model's notes among `rows[first:]` but those with an index below `keep`."""
        kept, seen = self.rows[:first], 0
        n_kept = sum(index < keep for index in self.indices)
        for row in self.rows[first:]:
            seen += row[0]
            if row[0] == 0 or seen <= n_kept:
                kept.append(row)
        self.rows, self.indices = kept, self.indices[:n_kept]

    def midi(self) -> bytes:
        """The player on channel 1, the model on channel 2."""
        rows = sorted(self.rows, key=lambda row: row[3])
        begin = rows[0][3] if rows else 0
        notes = np.zeros(len(rows), NOTE)
        for note, (who, pitch, velocity, start, end) in zip(notes, rows, strict=True):
            note["pitch"], note["velocity"], note["channel"] = pitch, velocity, who
            note["start"] = start - begin
            note["end"] = max(end, start + 10) - begin if end >= 0 else start - begin + 500
        pedals = np.zeros(len(self.pedals), PEDAL)
        for pedal, (t, value) in zip(pedals, self.pedals, strict=True):
            pedal["tick"], pedal["value"] = max(0, t - begin), value
        return midi_bytes(Performance(500, notes, pedals))


@dataclass
class Seat:
    """A player's place.

    Attributes:
        name: a secret, with which a connection is taken up again.
        send: to the page; None while it is away.
    """

    name: str
    session: LiveSession
    send: Send | None
    history: History = field(default_factory=History)
    since: float = 0.0  # when `send` was lost, or something was last played
    answer_from: int = 0  # rows of the history before the answer
    asked_at: float | None = None  # of the hand-over whose first note is not there yet
    computed_s: float = 0.0  # in this turn
    began_at: float = 0.0  # of the hand-over
    lag_ms: int = 0  # that a message takes one way
    n_late: int = 0  # how often in this turn the model was too late
    ticked: float = 0.0
    hurry: bool = False  # a program, which does not listen but waits
    clock: Callable[[], float] = time.monotonic
    _ahead_ms: deque[int] = field(default_factory=lambda: deque(maxlen=CLOCKS))

    def now(self) -> int:
        """The page's time, ms; it begins with the first message, which was the least late of the
        latest ones: messages are held up, and never come early.
        """
        return int(self.clock() * 1000) + max(self._ahead_ms) if self._ahead_ms else 0

    def hear_clock(self, t: int, heard_at: float | None = None) -> int:
        """Sets the clock by a message; the time that is believed.

        Args:
            heard_at: by this machine's clock; None now.
        """
        heard_ms = int((self.clock() if heard_at is None else heard_at) * 1000)
        if self._ahead_ms:
            t = min(t, heard_ms + max(self._ahead_ms) + JUMP_MS)
            if t < heard_ms + max(self._ahead_ms) - JUMP_MS:
                self._ahead_ms.clear()  # it was set back
        self._ahead_ms.append(t - heard_ms)
        return t

    def say(self, message: dict[str, Any]) -> None:
        """To the page, if it is there."""
        if self.send is not None:
            self.send(message)
