"""A duet: a person and a model take turns in one piece of music.

A session is a machine that is told events (`apply`) and asked to work (`step`). It never looks at
a clock: events carry the session's time in ms, and where one cuts what the model was playing, the
session writes down behind which note. So a recording of the events is the whole session, and
`replay` plays every note of it again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aria_jax.generate.decoding import slide
from aria_jax.generate.live.engine import STEPS, Engine, Row, Settings, opening
from aria_jax.generate.live.listening import Listener, Note
from aria_jax.generate.live.reading import ROOM, Reader
from data_pipeline.vocabulary import SEGMENT_MS

RESERVE = 256
"""Slots that are free when the model's turn begins."""
GUARD_MS = 250
"""What begins so soon after a change of the settings is played as it was: it is on its way."""
N_TAKES = 3
TAKE_MS = 8000
"""Of answers to choose from, where the settings say no length; never more than `MAX_TAKE_MS`."""
MAX_TAKE_MS = 30_000


@dataclass
class LiveSession:
    """One player's duet.

    Attributes:
        engine: shared by all sessions; row: this one's.
        seed: with the events it decides every note.
        settings: as they are now.
        turn: "player" or "model".
        n_turns: of the model so far.
        recording: every event, as `replay` takes them.
        now: time of the latest event.
        takes: token ids of answers to choose from.
    """

    engine: Engine
    row: Row
    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    turn: str = "player"
    n_turns: int = 0
    recording: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    takes: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._n_opening = len(opening(self.engine.tokenizer))
        self.listener = Listener(self.engine.tokenizer, opening(self.engine.tokenizer).tolist())
        self._reader = Reader(self.engine, self.row)
        self._answer_start = 0  # where the latest answer begins; 0: it cannot be taken back
        self._turn_start = 0  # the same, or where what is left of it begins
        self._answer_ms = self._earliest_ms = self._floor_ms = 0  # of the context
        self._take = self._wanted_takes = 0
        self._with_answer: list[int] = []  # the context, while other answers are made
        self._begun_at = 0  # tokens of this turn when the model last began to play
        self._ready = False  # whether the row's grammar is that of what is to be played
        self._told = 0  # notes of this turn that `step` has returned
        self._n_dropped = self._n_tokens_dropped = 0  # of this turn, with the oldest bars
        self._has_played = False  # the player, since the last hand-over

    @property
    def ids(self) -> list[int]:
        """The context."""
        return self.listener.ids

    # --- events ---

    def apply(self, event: dict[str, Any]) -> None:
        """Takes up an event: "type", "t" (ms), and what belongs to the type:

        note_on (pitch, velocity 1 to 127), note_off (pitch), pedal (value), hand_over (lead: ms
        before which nothing can be heard), take_over, settings (fields of `Settings`), resync
        (lead), undo, takes, choose (take), load (ids), tick.

        Events of the past happen now. Those that cut the model's music get "keep": how many of its
        notes stay, and "made": how many tokens there were. What makes no sense, such as a hand-over
        in the model's turn, changes nothing.

        Raises:
            UserError: settings out of range; nothing has happened.
        """
        changed = self.settings.changed(event) if event["type"] == "settings" else self.settings
        self.now = t = max(self.now, int(event["t"]))
        event, n_ids = {**event, "t": t}, len(self.ids)
        if self.turn == "player" and not self._wanted_takes:
            self._commit(t)
        self.settings = changed
        if event["type"] != "tick":
            getattr(self, f"_on_{event['type']}")(event, t)
        if event["type"] in ("note_off", "pedal") and self.turn == "player":
            self._commit(t)
        if event["type"] != "tick" or len(self.ids) != n_ids:
            self.recording.append(event)

    def _on_note_on(self, event: dict[str, Any], t: int) -> None:
        self._dismiss_takes()
        self._on_take_over(event, t)
        self._has_played = True
        self.listener.note_on(t, event["pitch"], event["velocity"])

    def _on_note_off(self, event: dict[str, Any], t: int) -> None:
        self.listener.note_off(t, event["pitch"])

    def _on_pedal(self, event: dict[str, Any], t: int) -> None:
        self.listener.pedal(t, event["value"])

    def _on_hand_over(self, event: dict[str, Any], t: int) -> None:
        if self.turn == "model":
            return
        self._dismiss_takes()
        self.listener.end_all(t)
        self.listener.skip_silence(t)
        self._answer_start = self._turn_start = len(self.ids)
        self._answer_ms = self.listener.context_ms(t)
        self._n_dropped = self._n_tokens_dropped = self._told = self._take = 0
        self.turn, self._has_played = "model", False
        self.n_turns += 1
        self._begin(self._answer_ms + int(event.get("lead", 0)))

    def _on_take_over(self, event: dict[str, Any], t: int) -> None:
        if self.turn == "model":
            self._cut(event, t)
            self.turn = "player"

    def _on_settings(self, event: dict[str, Any], t: int) -> None:
        if self.turn == "model":
            self._cut(event, t + GUARD_MS)
            self._begin(max(self._earliest_ms, self.listener.context_ms(t + GUARD_MS)))

    def _on_resync(self, event: dict[str, Any], t: int) -> None:
        """The model's music is too late: it goes on from now, behind what came in time."""
        if self.turn == "model":
            self._cut(event, t)
            self._begin(self.listener.context_ms(t) + int(event.get("lead", 0)))

    def _on_undo(self, event: dict[str, Any], t: int) -> None:
        if not self._answer_start:
            return
        self._dismiss_takes()
        self._truncate(self._answer_start)
        self.listener.move_origin(t, self._answer_ms)
        self.turn, self._answer_start = "player", 0

    def _on_takes(self, event: dict[str, Any], t: int) -> None:
        if not self._answer_start or self.makes_takes:
            return
        self._on_take_over(event, t)
        self.listener.end_all(t)
        self._with_answer, self.takes = self.ids[:], []
        self._wanted_takes, self._take = N_TAKES, 1
        self._begin_take()

    def _on_choose(self, event: dict[str, Any], t: int) -> None:
        if not 0 <= event["take"] < len(self.takes) or self.makes_takes:
            return
        chosen, start = self.takes[event["take"]], self._answer_start
        self._dismiss_takes()
        self._truncate(start)
        self.ids.extend(chosen)
        self._go_on_behind(start, self._answer_ms, t)

    def _on_load(self, event: dict[str, Any], t: int) -> None:
        self._dismiss_takes()
        self.turn, self._answer_start, self._has_played = "player", 0, False
        self._reader.truncate(0)
        most = self.engine.slots - RESERVE
        kept = slide(self.engine.tokenizer, np.asarray(event["ids"]), most)
        self.listener = Listener(self.engine.tokenizer, kept.tolist())
        self._go_on_behind(0, 0, t)

    def _go_on_behind(self, start: int, least_ms: int, t: int) -> None:
        """The player goes on at once behind what begins at `start` and was heard elsewhere."""
        notes = self.listener.played(start)
        end_ms = max((note.onset_ms + note.duration_ms for note in notes), default=least_ms)
        self.listener.heard_until(end_ms)
        self.listener.move_origin(t, end_ms)
        self._reader.catch_up(len(self.ids))

    # --- the context ---

    def _commit(self, t: int) -> None:
        """What the player has played enters the context, and the oldest bars leave a full one."""
        self.listener.commit(t)
        if len(self.ids) > self.engine.slots - RESERVE:
            kept = self._reader.shortened(self.ids)
            self._reader.truncate(0)
            self._replace_ids(kept)
        self._reader.follow(len(self.ids))

    def _replace_ids(self, kept: list[int]) -> None:
        """Goes on with the context without its oldest bars."""
        n_notes = len(self.listener.played(self._turn_start))
        n_dropped, n_tokens = len(self.ids) - len(kept), len(self.ids) - self._turn_start
        moved_ms = self.listener.replace_ids(kept)
        self._answer_ms -= moved_ms
        self._earliest_ms -= moved_ms
        self._turn_start = max(self._turn_start - n_dropped, self._n_opening)
        start = self._answer_start - n_dropped
        self._answer_start = start if start >= self._n_opening else 0
        self._n_dropped += n_notes - len(self.listener.played(self._turn_start))
        self._n_tokens_dropped += n_tokens - (len(kept) - self._turn_start)

    def _truncate(self, n: int) -> None:
        del self.ids[n:]
        self._reader.truncate(n)

    # --- the model's turn ---

    def _begin(self, earliest_ms: int) -> None:
        """The model plays on behind `ids`, nothing before `earliest_ms` of the context."""
        earliest_ms -= self.listener.skip_silence_before(earliest_ms)
        self._earliest_ms = max(earliest_ms, self.listener.latest_onset_ms())
        self._floor_ms = self.listener.begin_at(self._earliest_ms)
        # Where all is read the last id is read again: what follows it must be known.
        self._reader.truncate(len(self.ids) - 1)
        self._reader.catch_up(len(self.ids))
        self._ready, self._begun_at = False, self._made

    def _cut(self, event: dict[str, Any], t: int) -> None:
        """Drops the model's notes from `t` on, or those behind event["keep"]."""
        notes = self.listener.played(self._turn_start)
        event.setdefault("made", self._made)  # bars may have been dropped for what is cut now
        if "keep" not in event:
            end = self.end_of_answer
            before_ms = self.listener.context_ms(t if end is None else min(t, end))
            event["keep"] = self._n_dropped + sum(note.onset_ms < before_ms for note in notes)
        kept = notes[: max(0, event["keep"] - self._n_dropped)]
        self._truncate(kept[-1].at if kept else self._turn_start)
        self._told = min(self._told, event["keep"])
        for note in kept:
            self.listener.heard_until(note.onset_ms + note.duration_ms)

    def step(self, until: int) -> list[Note]:
        """Does a little work, some ms of it, if there is any.

        Args:
            until: session time that the model should have played to; it stops once beyond.

        Returns:
            the model's new notes.
        """
        if self._reader.has_work:
            self._reader.read(self.ids)
        elif self.makes_takes:
            self._work_on_take()
        elif self._wants_more(until):
            return self._play()
        return []

    def has_work(self, until: int) -> bool:
        """Whether `step` would do anything."""
        return self._reader.has_work or self.makes_takes or self._wants_more(until)

    @property
    def played_until(self) -> int:
        """Session time that the model has played to."""
        return self._session_ms(max(self.listener.latest_onset_ms(), self._answer_ms))

    @property
    def answer_began(self) -> int:
        """Session time of the latest hand-over."""
        return self._session_ms(self._answer_ms)

    @property
    def end_of_answer(self) -> int | None:
        """Session time at which the answer is long enough; None where it has no end."""
        if self.turn != "model" or not self.settings.length_ms:
            return None
        return self.answer_began + self.settings.length_ms

    @property
    def wants_hand_over(self) -> bool:
        """Whether the player has been silent for as long as the settings say."""
        listener, silence = self.listener, self.settings.silence_ms
        if self.turn == "model" or not silence or not self._has_played or not listener.is_silent:
            return False
        return self.now - self._session_ms(listener.sounded_until) >= silence

    @property
    def can_undo(self) -> bool:
        """Whether there is an answer to take back, or to find others for."""
        return bool(self._answer_start)

    @property
    def _made(self) -> int:
        """Tokens of this turn."""
        return self._n_tokens_dropped + len(self.ids) - self._turn_start

    def _session_ms(self, context_ms: int) -> int:
        return (self.listener.origin or 0) + context_ms

    def _wants_more(self, until: int) -> bool:
        end = self.end_of_answer
        most = until if end is None else min(until, end)
        return self.turn == "model" and self.played_until <= most

    def _play(self) -> list[Note]:
        """One call of the engine, a short one while there is no music in hand; new whole notes."""
        self._generate(min(STEPS, max(3, self._made - self._begun_at)))
        notes = self.listener.played(self._turn_start)
        fresh = [
            note.told(i, self._session_ms(0))
            for i, note in enumerate(notes[self._told - self._n_dropped :], self._told)
        ]
        self._told += len(fresh)
        end = self.end_of_answer
        if (kept := self._reader.rebuilt(self.ids)) is not None:
            self._replace_ids(kept)
        return [note for note in fresh if end is None or note.onset < end]

    def _generate(self, most: int) -> None:
        """Draws up to `most` tokens."""
        row, n_ids = self.row, len(self.ids)
        if not self._ready:
            self.engine.begin_turn(row, np.asarray(self.ids), self._floor_ms)
            self._ready = True
        row.n = self._made
        row.filled = n_ids
        row.set_controls(self.settings, (self.seed, self.n_turns, self._take))
        row.stop = row.n + min(most, self._reader.border(n_ids))
        self.ids.extend(self.engine.play([row])[0].tolist())
        self._reader.generated(len(self.ids))

    # --- other answers to choose from ---

    @property
    def makes_takes(self) -> bool:
        """Whether other answers are being made."""
        return self._wanted_takes > len(self.takes)

    def _begin_take(self) -> None:
        self._truncate(self._answer_start)
        self._turn_start, self._n_tokens_dropped, self._n_dropped = self._answer_start, 0, 0
        self._begin(self._answer_ms)

    def _work_on_take(self) -> None:
        """One call of the engine for the take that is being made."""
        self._generate(STEPS)
        end_ms = self._answer_ms + min(self.settings.length_ms or TAKE_MS, MAX_TAKE_MS)
        notes = self.listener.played(self._turn_start)
        latest_ms = max(self.listener.segment() * SEGMENT_MS, notes[-1].onset_ms if notes else 0)
        if latest_ms < end_ms and len(self.ids) < self.engine.slots - ROOM // 2:
            return
        kept = [note for note in notes if note.onset_ms < end_ms]
        self.takes.append(self.ids[self._turn_start : kept[-1].at if kept else self._turn_start])
        self._take += 1
        if self.makes_takes:
            self._begin_take()
        else:
            self._bring_answer_back()

    def _bring_answer_back(self) -> None:
        self._truncate(self._answer_start)
        self.ids[:] = self._with_answer
        self._reader.catch_up(len(self.ids))

    def _dismiss_takes(self) -> None:
        if self.makes_takes:
            self._bring_answer_back()
        self.takes, self._wanted_takes = [], 0

    def take_notes(self, take: int) -> list[Note]:
        """The notes of a take, in ms from the hand-over."""
        start = self._answer_start
        tail = Listener(self.engine.tokenizer, self._with_answer[:start] + self.takes[take])
        return [note.told(i, -self._answer_ms) for i, note in enumerate(tail.played(start))]


def replay(
    engine: Engine,
    row: Row,
    recording: Iterable[dict[str, Any]],
    *,
    seed: int,
    settings: Settings | None = None,
) -> LiveSession:
    """A session in which everything happens again.

    Args:
        recording: `LiveSession.recording` of a session with the same seed, first settings, model,
            and width of the engine.
    """
    session = LiveSession(engine, row, seed, settings or Settings())
    for event in recording:
        while session.turn == "model" and session._made < event.get("made", 0):
            session.step(2**31)
        while event["type"] == "choose" and session.has_work(-1):
            session.step(-1)
        session.apply(dict(event))
    return session
