"""Whatever a page says, the studio goes on, and nobody else notices."""

import copy
import json

import numpy as np
import pytest

from aria_jax.generate.live.engine import Row, Settings
from aria_jax.serve.app import _take
from aria_jax.serve.guard import Rate
from aria_jax.serve.messages import Hello, read_message
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
        seat._at -= 0.2  # time passes
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
        _take(studio, seat, event, b"MThd" if event["type"] == "load" else b"", 0.0)
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


def test_a_rate_lets_bursts_through_and_no_more():
    now = [0.0]
    rate = Rate(10, 20, clock=lambda: now[0])
    assert sum(rate.take() for _ in range(100)) == 20
    now[0] = 1.0
    assert sum(rate.take() for _ in range(100)) == 10
