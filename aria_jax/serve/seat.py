"""A player's place: the session, the page and its clock, and all that was heard."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aria_jax.generate.live.session import LiveSession
from data_pipeline.midi import NOTE, PEDAL, Performance, midi_bytes

JUMP_MS = 2000
"""How far a page's clock may run ahead of the server's."""
Send = Callable[[dict[str, Any]], None]


@dataclass
class History:
    """All that was heard, for the MIDI file: rows of [who, pitch, velocity, start, end]."""

    rows: list[list[int]] = field(default_factory=list)
    pedals: list[tuple[int, int]] = field(default_factory=list)

    def end(self, pitch: int, t: int) -> None:
        """The player's key goes up."""
        for row in reversed(self.rows):
            if row[0] == 0 and row[1] == pitch and row[4] < 0:
                row[4] = t
                return

    def without_answer(self, first: int, keep: int = 0) -> None:
        """Drops the model's notes among `rows[first:]` but the first `keep`."""
        kept, seen = self.rows[:first], 0
        for row in self.rows[first:]:
            seen += row[0]
            if row[0] == 0 or seen <= keep:
                kept.append(row)
        self.rows = kept

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
    ticked: float = 0.0
    resyncing: bool = False
    hurry: bool = False  # a program, which does not listen but waits
    _t: int = 0
    _at: float = 0.0

    def now(self) -> int:
        """The page's time, ms; it begins with the first message."""
        return self._t + int((time.monotonic() - self._at) * 1000) if self._at else self._t

    def hear_clock(self, t: int) -> int:
        """Sets the clock by a message; the time that is believed."""
        if not self._at:
            self._t, self._at = t, time.monotonic()
        believed = min(t, self.now() + JUMP_MS)
        if abs(believed - self.now()) > 20:
            self._t, self._at = believed, time.monotonic()
        return believed

    def say(self, message: dict[str, Any]) -> None:
        """To the page, if it is there."""
        if self.send is not None:
            self.send(message)
