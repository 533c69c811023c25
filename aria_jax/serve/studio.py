"""Where duets are played: one thread that owns the model, and a seat for every player.

Messages come in from the web as calls (`tell`) and go out through each seat's `send`. Whoever waits
for a first note comes first, then who has least music left to hear, then who plays.
"""

import base64
import json
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from aria_jax.generate.continuation import make_prompt
from aria_jax.generate.live.engine import Engine
from aria_jax.generate.live.listening import Note
from aria_jax.generate.live.session import LiveSession
from aria_jax.models.heads import check_known
from aria_jax.serve.seat import Seat, Send
from data_pipeline.artifact import write_atomically
from data_pipeline.errors import UserError
from data_pipeline.midi import compat_of, read_midi

AHEAD_MS = 2000
"""Music that is sent before it is heard: it bridges a busy second."""
AWAY_S = 120
"""How long the session of a lost connection waits."""
IDLE_S = 900
"""How long one waits in which nothing is played."""
MIN_BUFFER_MS = 300
"""Of the model's music: with less in hand nothing else is computed."""
MAX_LEAD_MS = 2000
CHORD = 4
"""Notes that must be there before the first one is heard: they may begin together."""
TICK_S = 0.05
_log = logging.getLogger(__name__)
NEVER = 2**40


class Studio:
    """The thread that plays.

    Args:
        engine: warm.
        reading: of the MIDI files of the model's corpus.
        save_to: where sessions are saved; None nowhere.
        quiet: set while nobody waits for music, for whoever computes beside it.
    """

    def __init__(
        self,
        engine: Engine,
        reading: str,
        *,
        save_to: Path | None = None,
        about: str = "",
        quiet: threading.Event | None = None,
    ) -> None:
        self.engine, self._reading, self._save_to = engine, reading, save_to
        self._quiet = quiet or threading.Event()
        self.about = about
        self.seats: dict[str, Seat] = {}
        self.saved: list[Path] = []
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._chord_ms: deque[float] = deque(maxlen=20)
        self._thread = threading.Thread(target=self._run, name="studio", daemon=True)

    def start(self) -> None:
        """Begins to play."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all sessions, and saves them."""
        self._calls.put(None)
        self._thread.join(timeout=20)

    def tell(self, call: Callable[[], None]) -> None:
        """Runs something in the studio's thread."""
        self._calls.put(call)

    # --- the thread ---

    def _run(self) -> None:
        worked = False
        while True:
            try:
                call = self._calls.get(timeout=0 if worked else TICK_S / 2)
                if call is None:
                    break
                call()
            except queue.Empty:
                pass
            except Exception:  # of one session; the others play on
                _log.exception("a message could not be taken up")
            self._tick()
            worked = self._work()
        for name in list(self.seats):
            self.leave(name, "the server stops; the session is saved")

    def _tick(self) -> None:
        now = time.monotonic()
        for seat in list(self.seats.values()):
            if now - seat.ticked < TICK_S:
                continue
            seat.ticked = now
            limit = IDLE_S if seat.send is not None else AWAY_S
            if now - seat.since > limit:
                self.leave(seat.name, f"nothing was played for {limit // 60} minutes")
            elif seat.hurry:
                if not seat.session.has_work(NEVER):
                    midi = base64.b64encode(seat.history.midi()).decode()
                    seat.say({"type": "done", "midi": midi})
                    self.leave(seat.name, "")
            elif seat.send is not None:
                self._guarded(seat, self._tick_seat)

    def _guarded(self, seat: Seat, call: Callable[[Seat], None]) -> None:
        """A session in which something goes wrong is ended, and no other."""
        try:
            call(seat)
        except Exception:
            _log.exception("a session is ended")
            self.leave(seat.name, "something went wrong on the server, which says what")

    def _tick_seat(self, seat: Seat) -> None:
        session, t = seat.session, seat.now()
        self.apply(seat, {"type": "tick", "t": t})
        end = session.end_of_answer
        if session.wants_hand_over:
            self.apply(seat, {"type": "hand_over", "t": t})
        elif end is not None and t >= end:
            self.apply(seat, {"type": "take_over", "t": t})

    def _work(self) -> bool:
        """A step of the session that needs it most; whether there was one."""
        waiting = [seat for seat in self.seats.values() if seat.session.has_work(self._until(seat))]
        if any(self._is_pressed(seat) for seat in waiting):
            self._quiet.clear()
        else:
            self._quiet.set()
        if not waiting:
            return False

        def urgency(seat: Seat) -> tuple[int, int]:
            if seat.asked_at is not None:
                return 0, int(seat.asked_at * 1000)
            if seat.session.turn == "model":
                return 1, seat.session.played_until - seat.now()
            return 2, 0

        self._guarded(min(waiting, key=urgency), self._step)
        return True

    def _is_pressed(self, seat: Seat) -> bool:
        if seat.hurry or seat.session.turn != "model":
            return False
        in_hand_ms = seat.session.played_until - seat.now()
        return seat.asked_at is not None or in_hand_ms < MIN_BUFFER_MS

    def _step(self, seat: Seat) -> None:
        began, n_takes = time.monotonic(), len(seat.session.takes)
        notes = seat.session.step(self._until(seat))
        if seat.session.turn == "model":
            seat.computed_s += time.monotonic() - began
        if notes and not seat.hurry and notes[0].onset < seat.now() + seat.lag_ms:
            # It would be heard too late: the model plays on from a moment that can be reached.
            seat.n_late += 1
            self.apply(seat, {"type": "resync", "t": seat.now(), "keep": notes[0].index})
        elif notes:
            self._send_notes(seat, notes)
        elif len(seat.session.takes) > n_takes and not seat.session.makes_takes:
            takes = [
                [list(asdict(note).values()) for note in seat.session.take_notes(i)]
                for i in range(len(seat.session.takes))
            ]
            seat.say({"type": "takes", "takes": takes})

    def _until(self, seat: Seat) -> int:
        if seat.hurry:
            return NEVER
        return seat.now() + AHEAD_MS if seat.send is not None else -1

    def _send_notes(self, seat: Seat, notes: list[Note]) -> None:
        session = seat.session
        self._write_down(seat, notes)
        first_ms, now = None, time.monotonic()
        if seat.asked_at is not None:
            first_ms = (now - seat.asked_at) * 1000
            seat.asked_at = None
        if notes[0].index < CHORD <= notes[-1].index + 1:
            self._chord_ms.append((now - seat.began_at) * 1000)
        played_ms = session.played_until - session.answer_began
        message = {
            "type": "notes",
            "turn": session.n_turns,
            "notes": [list(asdict(note).values()) for note in notes],
            "first_ms": first_ms,
            "ahead_ms": session.played_until - seat.now(),
            "speed": played_ms / 1000 / max(seat.computed_s, 1e-3),
        }
        seat.say(message)

    def _write_down(self, seat: Seat, notes: list[Note], shift_ms: int = 0) -> None:
        for note in notes:
            if note.pitch is not None:
                start = note.onset + shift_ms
                row = [1, note.pitch, note.velocity, start, start + note.duration_ms]
                seat.history.rows.append(row)
                seat.history.indices.append(note.index)

    # --- what a page may do; in the studio's thread ---

    def enter(self, send: Send, name: str | None, seed: int | None) -> Seat | None:
        """A seat for a page: its old one, or a new one; None where all are taken."""
        seat = self.seats.get(name or "")
        resumed = seat is not None
        if seat is None:
            # A page that is away makes room for one that is there.
            away = [one for one in self.seats.values() if one.send is None]
            row = self.engine.take_row()
            if row is None and away:
                self.leave(min(away, key=lambda one: one.since).name, "")
                row = self.engine.take_row()
            if row is None:
                return None
            seed = secrets.randbits(32) if seed is None else seed
            seat = Seat(secrets.token_urlsafe(18), LiveSession(self.engine, row, seed), send)
            self.seats[seat.name] = seat
        elif seat.send is not None and seat.send is not send:
            seat.say({"type": "error", "message": "this session went on in another window"})
        seat.send, seat.since = send, time.monotonic()
        session = seat.session
        played = [row[1:] for row in seat.history.rows[seat.answer_from :] if row[0] == 1]
        answer = [[i, *row] for i, row in zip(seat.history.indices, played, strict=False)]
        seat.say(
            {
                "type": "welcome",
                "session": seat.name,
                "resumed": resumed,
                "turn": session.turn,
                "n_turns": session.n_turns,
                "settings": asdict(session.settings),
                "can_undo": session.can_undo,
                "history": seat.history.rows[-200:],
                "answer": answer if session.turn == "model" else [],
                "model": self.about,
                "seed": session.seed,
            }
        )
        return seat

    def lose(self, seat: Seat, send: Send) -> None:
        """The page is gone; its session waits."""
        if seat.send is send:
            seat.send, seat.since = None, time.monotonic()

    def leave(self, name: str, why: str) -> None:
        """Ends a session."""
        seat = self.seats.pop(name, None)
        if seat is None:
            return
        self.engine.give_back(seat.session.row)
        self._save(seat)
        if why:
            seat.say({"type": "ended", "message": why})

    def _save(self, seat: Seat) -> None:
        if self._save_to is None or not seat.history.rows or seat.hurry:
            return
        self._save_to.mkdir(parents=True, exist_ok=True)
        stem = time.strftime("duet-%Y%m%d-%H%M%S-") + seat.name[:6].replace("-", "_")
        path = self._save_to / f"{stem}.mid"
        write_atomically(path, seat.history.midi())
        record = {"seed": seat.session.seed, "width": self.engine.width, "model": self.about,
                  "events": seat.session.recording}  # fmt: skip
        write_atomically(path.with_suffix(".json"), json.dumps(record))
        self.saved.append(path)

    def apply(self, seat: Seat, event: dict[str, Any], heard_at: float | None = None) -> None:
        """An event of `LiveSession.apply`, and what follows from it for the page."""
        session, kind, t = seat.session, event["type"], event["t"]
        turn, n_turns, could_undo = session.turn, session.n_turns, session.can_undo
        if kind == "hand_over" and turn == "player":
            seat.lag_ms, seat.n_late = event.get("lag", 0), 0
        if kind in ("hand_over", "resync"):
            event = {**event, "lead": self.lead_ms(seat)}
            event.pop("lag", None)
        chosen = None
        if kind == "choose" and not session.makes_takes and event["take"] < len(session.takes):
            chosen = session.take_notes(event["take"])
        try:
            session.apply(event)
        except UserError as error:
            seat.say({"type": "error", "message": str(error)})
            return
        if kind in ("note_on", "note_off", "pedal", "hand_over"):
            self._remember(seat, kind, event, t)
        done = session.recording[-1] if session.recording else {}
        if done.get("type") == kind and "keep" in done:
            seat.history.without_answer(seat.answer_from, done["keep"])
            seat.say({"type": "keep", "turn": session.n_turns, "keep": done["keep"]})
        if kind == "undo" and could_undo:
            seat.history.without_answer(seat.answer_from)
            seat.say({"type": "keep", "turn": session.n_turns, "keep": 0})
        if chosen is not None:
            seat.history.without_answer(seat.answer_from)
            self._write_down(
                seat, chosen, t - max((n.onset + n.duration_ms for n in chosen), default=0)
            )
        if session.n_turns != n_turns:
            seat.asked_at, seat.computed_s = heard_at or time.monotonic(), 0.0
            seat.began_at = seat.asked_at
            seat.answer_from, seat.history.indices = len(seat.history.rows), []
        if session.turn == "player":
            seat.asked_at = None
        if (session.turn, session.n_turns, session.can_undo) != (turn, n_turns, could_undo):
            seat.say({"type": "turn", "turn": session.turn, "n_turns": session.n_turns,
                      "t": session.now, "can_undo": session.can_undo})  # fmt: skip

    def _remember(self, seat: Seat, kind: str, event: dict[str, Any], t: int) -> None:
        seat.since, history = time.monotonic(), seat.history
        if kind == "note_on":
            history.rows.append([0, event["pitch"], event["velocity"], t, -1])
        elif kind == "note_off":
            history.end(event["pitch"], t)
        elif kind == "pedal":
            history.pedals.append((t, event["value"]))
        else:
            for row in history.rows:
                row[4] = t if row[4] < 0 else row[4]

    def lead_ms(self, seat: Seat) -> int:
        """Before which nothing can be heard after a hand-over: what a chord takes nearly always,
        and twice as much each time that it was too little.
        """
        usual = float(np.quantile(self._chord_ms, 0.9)) if self._chord_ms else 100.0
        return int(min(max(usual, 20.0) * 2 ** min(seat.n_late, 8), MAX_LEAD_MS)) + 2 * seat.lag_ms

    def load(self, seat: Seat, data: bytes, seconds: float, t: int) -> None:
        """A MIDI file becomes the context."""
        tokenizer = self.engine.tokenizer
        try:
            performance = read_midi(data, compat=compat_of(self._reading))
            ids = make_prompt(performance, tokenizer, seconds=seconds)
            check_known(self.engine.weights.config, ids, tokenizer.tokens, "the file")
        except UserError as error:
            seat.say({"type": "error", "message": str(error)})
            return
        self.apply(seat, {"type": "load", "t": t, "ids": ids.tolist()})
        notes = tokenizer.decode(ids).notes
        shift = t - int(notes["end"].max())
        rows = [
            [0, int(n["pitch"]), int(n["velocity"]), int(n["start"]) + shift, int(n["end"]) + shift]
            for n in notes
        ]
        seat.history.rows += rows
        seat.answer_from = len(seat.history.rows)
        seat.say({"type": "loaded", "rows": rows})
