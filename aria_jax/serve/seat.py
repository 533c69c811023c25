"""A player's place: the session, the page and its clock, and all that was heard."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aria_jax.generate.live.session import LiveSession
from data_pipeline.midi import NOTE, PEDAL, Performance, midi_bytes

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
