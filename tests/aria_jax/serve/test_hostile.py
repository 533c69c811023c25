"""Whatever a page says, the studio goes on, and nobody else notices."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest

from aria_jax.generate.live.engine import Row, Settings
from aria_jax.generate.live.session import replay
from aria_jax.serve.app import _take
from aria_jax.serve.guard import Rate
from aria_jax.serve.seat import JUMP_MS, Hello, History, Seat, read_message
from aria_jax.serve.studio import Studio
from data_pipeline.errors import UserError
from tests.aria_jax.generate.live.test_live import Metronome

WORDS = (
    "hello", "note_on", "note_off", "pedal", "settings", "choose", "load", "hand_over",
    "take_over", "undo", "takes", "clock", "save", "bye",
)  # fmt: skip
FIELDS = {
    "pitch": 60, "velocity": 64, "value": 127, "take": 1, "data": "TVRoZA==", "seconds": 3,
    "temperature": 0.9, "min_p": 0.1, "density": 1.0, "length_ms": 900, "silence_ms": 500,
    "lag": 3, "session": "x", "seed": 1,
}  # fmt: skip
OF_WORD = {
    "note_on": ("pitch", "velocity"), "note_off": ("pitch",), "pedal": ("value",),
    "settings": ("temperature", "min_p", "density", "length_ms", "silence_ms"),
    "choose": ("take",), "load": ("data", "seconds"), "hello": ("session", "seed"),
}  # fmt: skip
STRANGE = (
    None, -1, 0, 2**31 - 1, 2**31, 2**63, 10**400, 1.5, True, "", "60", [], {}, [[]], "\ud800",
    "\x00", "../../etc/passwd", "__class__", float("nan"), float("inf"), "A" * 3000,
)  # fmt: skip


class Engine(Metronome):
    """With places for two."""

    width = 1

    def __init__(self) -> None:
        self.free = [Row(()), Row(())]

    def take_row(self) -> Row | None:
        return self.free.pop() if self.free else None

    def give_back(self, row: Row) -> None:
        self.free.append(row)


def hostile_text(rng: np.random.Generator, clock: int) -> str:
    """A message that is right, nearly right, or nothing at all."""
    word = str(rng.choice(WORDS))
    message = {"type": word}
    if word != "hello":
        message["t"] = clock
    for name in OF_WORD.get(word, ()):
        message[name] = FIELDS[name]
    kind = rng.integers(0, 8)
    if kind == 0:
        message["t"] = int(rng.choice([0, clock, clock + 10**6, 2**31 - 1]))
    elif kind == 1:
        message[str(rng.choice([*FIELDS, "t", "type", "extra"]))] = STRANGE[
            int(rng.integers(len(STRANGE)))
        ]
    elif kind == 2:
        message.pop(str(rng.choice(list(message))))
    text = json.dumps(message)
    if kind == 3:
        at = int(rng.integers(len(text)))
        text = text[:at] + chr(int(rng.integers(0x110000 - 1))) + text[at + 1 :]
    elif kind == 4:
        text = text[: int(rng.integers(len(text)))]
    return text


@pytest.mark.parametrize("n", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_messages_neither_crash_nor_touch_anyone_else(n):
    rng = np.random.default_rng(0)
    studio = Studio(Engine(), "standard")
    heard = []
    other = studio.enter(heard.append, None, 7)
    other.session.apply({"type": "note_on", "t": 0, "pitch": 60, "velocity": 60})
    other.session.apply({"type": "note_off", "t": 300, "pitch": 60})
    before = copy.deepcopy((other.session.ids, other.session.recording, other.history.rows))
    seat, n_valid, clock = None, 0, 0
    for _ in range(n):
        clock += int(rng.integers(0, 400))
        if seat is None or seat.name not in studio.seats:
            seat = studio.enter(lambda message: json.dumps(message), None, 1)
        seat.clock = lambda at=clock: at / 1000
        try:
            message = read_message(hostile_text(rng, clock))
        except UserError:
            continue
        n_valid += 1
        if isinstance(message, Hello):
            continue
        event = message.model_dump(exclude_none=True)
        if event["type"] == "bye":
            studio.leave(seat.name, "goodbye")
            continue
        _take(studio, seat, event, b"MThd" if event["type"] == "load" else b"", clock / 1000)
        for _ in range(int(rng.integers(0, 4))):
            if seat.session.has_work(seat.now() + 2000):
                notes = seat.session.step(seat.now() + 2000)
                if notes:
                    studio._send_notes(seat, notes)
        if rng.random() < 0.3 and seat.name in studio.seats:
            studio._tick_seat(seat)
        assert len(seat.session.ids) <= Engine.slots
    assert n_valid > n / 5
    assert (other.session.ids, other.session.recording, other.history.rows) == before
    assert other.session.settings == Settings()
    assert [message["type"] for message in heard] == ["welcome"]


class SlowEngine(Engine):
    """Every call takes a while, by the clock of the test."""

    def __init__(self, now: list[float], taking_s: list[float]) -> None:
        super().__init__()
        self.now, self.taking_s = now, taking_s

    def play(self, rows: list[Row]) -> list[np.ndarray]:
        self.now[0] += self.taking_s.pop(0) if self.taking_s else 0.005
        return super().play(rows)


def test_what_would_be_heard_late_is_played_anew_from_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("aria_jax.serve.studio.time", SimpleNamespace(monotonic=lambda: now[0]))
    # The first note takes longer than ever before, and later something else runs for 3 s.
    engine = SlowEngine(now, [0.4, *[0.005] * 4, 3.0])
    studio, heard, late_ms = Studio(engine, "standard"), {}, []

    def send(message: dict) -> None:
        if message["type"] == "keep":
            for index in [index for index in heard if index >= message["keep"]]:
                del heard[index]
        if message["type"] == "notes":
            late_ms.extend(seat.now() - note[3] for note in message["notes"])
            heard.update({note[0]: note[3] for note in message["notes"]})

    seat = studio.enter(send, None, 3)
    seat.clock = lambda: now[0]
    seat.hear_clock(0)
    studio.apply(seat, {"type": "note_on", "t": 0, "pitch": 60, "velocity": 60})
    studio.apply(seat, {"type": "note_off", "t": 300, "pitch": 60})
    now[0] += 0.4
    studio.apply(seat, {"type": "hand_over", "t": 400, "lag": 0})
    while seat.now() < 9000:
        now[0] += 0.01
        studio._tick()
        while studio._work():
            pass
    onsets = [heard[index] for index in sorted(heard)]
    assert sorted(heard) == list(range(len(heard))) and len(onsets) > 15
    assert onsets == sorted(onsets) and max(late_ms) <= 0
    assert sum(event["type"] == "resync" for event in seat.session.recording) >= 2
    again = replay(Engine(), Row(()), seat.session.recording, seed=3)
    while len(again.ids) < len(seat.session.ids):
        again.step(2**31)
    assert again.ids[: len(seat.session.ids)] == seat.session.ids


def test_pedal_events_are_counted_but_are_no_notes_of_the_history():
    history = History([[0, 60, 60, 0, 100]])
    history.rows += [[1, pitch, 60, 100, 200] for pitch in (70, 72, 74)]
    history.indices = [0, 2, 5]  # pedal events between
    history.without_answer(1, keep=3)
    assert [row[1] for row in history.rows] == [60, 70, 72] and history.indices == [0, 2]


def test_a_clock_is_told_by_the_message_that_was_held_up_least():
    now = [5.0]
    seat = Seat("a", None, None, clock=lambda: now[0])
    for t, held_up_s in ((0, 0.08), (250, 0.002), (500, 0.3), (750, 0.05)):
        seat.hear_clock(t, 5.0 + t / 1000 + held_up_s)
    now[0] = 6.0
    assert seat.now() == 998
    assert seat.hear_clock(10**6, 6.0) == 998 + JUMP_MS  # nobody's clock jumps so far
    seat.hear_clock(10, 6.0)
    assert seat.now() == 10  # set back


def test_a_rate_lets_bursts_through_and_no_more():
    now = [0.0]
    rate = Rate(10, 20, clock=lambda: now[0])
    assert sum(rate.take() for _ in range(100)) == 20
    now[0] = 1.0
    assert sum(rate.take() for _ in range(100)) == 10
