"""What a player plays, as tokens, while it is played.

Tokens come in the order of onsets and a note's last token is its duration, so a note that still
sounds, by key or by pedal, holds back all that began after it. No duration is longer than one
segment: whoever is held for 5 s is known. Times are ms on the session's clock, which never runs
backwards; the context's own clock stands still in long silences (`SILENCE_MS`) and is moved where
bars are taken back.
"""

from dataclasses import dataclass, field

import numpy as np

from data_pipeline.midi import PEDAL_DOWN
from data_pipeline.tokenizers import AriaTokenizer
from data_pipeline.vocabulary import (
    DUR_INDEX,
    ONSET_INDEX,
    SEGMENT_MS,
    STEP_MS,
    VELOCITY_INDEX,
    Kind,
)

SILENCE_MS = 10_000
"""Of a longer silence between notes the context keeps this much."""
MAX_PENDING = 32
"""Notes that may wait for their end: more than sound at once on any piano; the oldest then ends."""


@dataclass
class _Pending:
    """A note, or a pedal event (`pitch` None), that is not among the tokens yet.

    Attributes:
        start, end: ms of the session; `end` None while it sounds.
        key_up: the key is up, and the pedal alone sounds it.
    """

    start: int
    pitch: int | None
    velocity: int
    end: int | None = None
    key_up: bool = False


@dataclass
class Note:
    """A note or pedal event of the model, for whoever plays it.

    Attributes:
        index: within its turn, from 0.
        pitch: None of a pedal event, whose velocity is 127 (down) or 0.
        onset: ms of the session.
    """

    index: int
    pitch: int | None
    velocity: int
    onset: int
    duration_ms: int


@dataclass
class Played:
    """A note or pedal event of the context.

    Attributes:
        at: index behind its last token.
        onset_ms: of the context.
        pitch: None of a pedal event, whose velocity is 127 (down) or 0.
    """

    at: int
    onset_ms: int
    pitch: int | None
    velocity: int
    duration_ms: int

    def told(self, index: int, shift_ms: int) -> Note:
        """For whoever plays it, `shift_ms` later."""
        onset = self.onset_ms + shift_ms
        return Note(index, self.pitch, self.velocity, onset, self.duration_ms)


@dataclass
class Listener:
    """The context of a session, and what waits to enter it.

    Attributes:
        tokenizer: its tokens.
        ids: tokens so far; whole events but for a model's last one.
        origin: session time of the context's time 0; None before the first note.
        sounded_until: of the context, in ms.
    """

    tokenizer: AriaTokenizer
    ids: list[int]
    origin: int | None = None
    sounded_until: int = 0
    _pending: list[_Pending] = field(default_factory=list)
    _pedal: bool = False

    # --- playing ---

    def note_on(self, t: int, pitch: int, velocity: int) -> None:
        """A key goes down."""
        if self.origin is None:
            self.origin = t
        self.skip_silence(t)
        self._end([one for one in self._sounding() if one.pitch == pitch and not one.key_up], t)
        if len(sounding := self._sounding()) >= MAX_PENDING:
            self._end(sounding[:1], t)
        self._pending.append(_Pending(t, pitch, velocity))

    def note_off(self, t: int, pitch: int) -> None:
        """A key goes up; keys that are not down are no matter."""
        mine = [one for one in self._sounding() if one.pitch == pitch and not one.key_up]
        if self._pedal:
            for one in mine:
                one.key_up = True
        else:
            self._end(mine, t)

    def pedal(self, t: int, value: int) -> None:
        """The sustain pedal, 0 to 127."""
        down = value >= PEDAL_DOWN
        if down == self._pedal:
            return
        self._pedal = down
        if not down:
            self._end([one for one in self._sounding() if one.key_up], t)
        if self.tokenizer.has_pedal and self.origin is not None:
            self._pending.append(_Pending(t, None, 127 if down else 0, end=t))

    def commit(self, t: int) -> None:
        """Moves what is known at `t` into the context."""
        self._end([one for one in self._sounding() if one.start + SEGMENT_MS <= t], t)
        while self._pending and self._pending[0].end is not None:
            self._write(self._pending.pop(0))

    def end_all(self, t: int) -> None:
        """Ends and commits what sounds: the player's turn is over."""
        self._end(self._sounding(), t)
        self.commit(t)

    def skip_silence(self, t: int) -> None:
        """Nothing sounds and something is to begin: what is too long of the silence is left out."""
        if self.origin is not None and not self._pending:
            self.skip_silence_before(t - self.origin)

    def skip_silence_before(self, onset_ms: int) -> int:
        """The same, of a time of the context; how many ms are left out."""
        excess_ms = max(0, onset_ms - self.sounded_until - SILENCE_MS)
        self.origin = None if self.origin is None else self.origin + excess_ms
        return excess_ms

    @property
    def is_silent(self) -> bool:
        """Whether nothing of the player's sounds."""
        return not self._sounding()

    def _sounding(self) -> list[_Pending]:
        return [one for one in self._pending if one.end is None]

    def _end(self, notes: list[_Pending], t: int) -> None:
        for one in notes:
            one.end = max(t, one.start)

    def _write(self, one: _Pending) -> None:
        origin, end = self.origin or 0, one.end or one.start
        onset_ms = max(one.start - origin, self.latest_onset_ms())
        self.wait_until(onset_ms)
        tokenizer = self.tokenizer
        onset_id = tokenizer.first_onset_id + int(ONSET_INDEX[onset_ms % SEGMENT_MS])
        if one.pitch is None:
            self.ids += [tokenizer.first_pedal_id + (one.velocity == 0), onset_id]
            return
        note = ("piano", one.pitch, int(VELOCITY_INDEX[one.velocity]) * 10)
        duration = max(int(DUR_INDEX[min(end - one.start, SEGMENT_MS)]), 1)
        self.ids += [tokenizer.id_of(note), onset_id, tokenizer.first_dur_id + duration]
        self.sounded_until = max(self.sounded_until, end - origin)

    # --- the context's clock ---

    def context_ms(self, t: int) -> int:
        """A time of the session on the context's clock."""
        if self.origin is None:
            self.origin = t
        return max(0, t - self.origin)

    def segment(self) -> int:
        """`<T>` so far."""
        return int(np.count_nonzero(np.asarray(self.ids) == self.tokenizer.time_id))

    def latest_onset_ms(self) -> int:
        """Of the context; 0 before the first event."""
        onsets_ms = self.tokenizer.events(np.asarray(self.ids))[1]
        return int(onsets_ms[-1]) if len(onsets_ms) else 0

    def wait_until(self, onset_ms: int) -> None:
        """`<T>` up to the segment of that time."""
        missing = onset_ms // SEGMENT_MS - self.segment()
        self.ids += [self.tokenizer.time_id] * missing

    def begin_at(self, onset_ms: int) -> int:
        """`wait_until`, rounded up to a step; ms within the segment."""
        rounded = -(-onset_ms // STEP_MS) * STEP_MS
        self.wait_until(rounded)
        return rounded % SEGMENT_MS

    def move_origin(self, t: int, onset_ms: int) -> None:
        """From now on session time `t` is `onset_ms` of the context."""
        self.origin = t - onset_ms
        self.sounded_until = min(self.sounded_until, onset_ms)

    def replace_ids(self, kept: list[int]) -> int:
        """Goes on with a context that lacks its oldest segments; how many ms they were."""
        before = self.segment()
        self.ids = kept
        moved_ms = (before - self.segment()) * SEGMENT_MS
        self.origin = None if self.origin is None else self.origin + moved_ms
        self.sounded_until -= moved_ms
        return moved_ms

    def heard_until(self, onset_ms: int) -> None:
        """A model's note sounded until then."""
        self.sounded_until = max(self.sounded_until, onset_ms)

    def played(self, start: int) -> list[Played]:
        """Whole events of `ids[start:]`."""
        tokenizer, ids = self.tokenizer, np.asarray(self.ids)
        at, onsets_ms = tokenizer.events(ids)
        found = []
        for first, onset_ms in zip(at.tolist(), onsets_ms.tolist(), strict=True):
            if first < start:
                continue
            if tokenizer.kind[ids[first]] == Kind.PEDAL:
                value = 127 if ids[first] == tokenizer.first_pedal_id else 0
                found.append(Played(first + 2, onset_ms, None, value, 0))
            else:
                pitch, velocity = tokenizer.pitch[ids[first]], tokenizer.velocity[ids[first]]
                duration_ms = tokenizer.dur_ms[ids[first + 2]]
                found.append(
                    Played(first + 3, onset_ms, int(pitch), int(velocity), int(duration_ms))
                )
        return found
