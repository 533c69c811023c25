"""A duet without any web: what is heard, and that a recording plays it again."""

import jax
import numpy as np
import pytest
from jax import monitoring

from aria_jax.generate.cache import decode_rows, empty_cache, extend_cache, prefill
from aria_jax.generate.live.engine import (
    CHUNKS,
    Engine,
    Row,
    Settings,
    _tilted,
    duet_words,
    opening,
)
from aria_jax.generate.live.listening import Listener
from aria_jax.generate.live.session import RESERVE, LiveSession, replay
from aria_jax.generate.sampler import MinP, draw_min_p
from aria_jax.generate.weights import decoder_weights
from data_pipeline.errors import UserError
from data_pipeline.midi import PEDAL, Performance
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

TOKENIZER = Tokenizer.preset("aria")


def as_events(performance: Performance) -> list[dict]:
    """A performance of 1 tick = 1 ms as a player's events."""
    events = []
    for note in performance.notes.tolist():
        row = dict(zip(performance.notes.dtype.names, note, strict=True))
        on = {"type": "note_on", "pitch": row["pitch"], "velocity": row["velocity"]}
        events.append((row["start"], 1, {**on, "t": row["start"]}))
        events.append((row["end"], 0, {"type": "note_off", "pitch": row["pitch"], "t": row["end"]}))
    for tick, value in zip(performance.pedals["tick"], performance.pedals["value"], strict=True):
        events.append((int(tick), 2, {"type": "pedal", "value": int(value), "t": int(tick)}))
    events.sort(key=lambda event: event[:2])
    return [event for _, _, event in events]


def without_restrikes(performance: Performance) -> Performance:
    """Every key has a pitch of its own, as no two fingers can hold one key down."""
    notes = performance.notes.copy()
    notes["pitch"] = 30 + np.arange(len(notes)) % 60
    return Performance(500, notes, performance.pedals)


class Metronome:
    """An engine without a model: it plays a note every 300 ms, which keys the seed decides."""

    slots, tokenizer = 512, TOKENIZER

    def new_cache(self) -> tuple:
        return ()

    def read(self, cache: tuple, ids: np.ndarray, start: int, size: int) -> tuple:
        assert 0 < len(ids) <= size and start + len(ids) <= self.slots
        return None, cache

    def begin_turn(self, row: Row, ids: np.ndarray, earliest_ms: int) -> None:
        last = TOKENIZER.onset_ms[ids[ids >= TOKENIZER.first_onset_id][-1:]]
        row.grammar = [-(-max(earliest_ms, *last.tolist(), 0) // 300) * 300, 0]

    def play(self, rows: list[Row]) -> list[np.ndarray]:
        (row,) = rows
        ids = []
        while row.n < row.stop:
            onset_ms, phase = row.grammar
            if phase == 0 and onset_ms >= 5000:
                token, row.grammar = TOKENIZER.time_id, [onset_ms % 5000, 0]
            elif phase == 0:
                rng = np.random.default_rng([*row.controls.seed_Rx3[0].tolist(), row.n])
                token = TOKENIZER.id_of(("piano", int(rng.integers(30, 90)), 60))
                row.grammar = [onset_ms, 1]
            elif phase == 1:
                token, row.grammar = TOKENIZER.first_onset_id + onset_ms // 10, [onset_ms, 2]
            else:
                token, row.grammar = TOKENIZER.first_dur_id + 20, [onset_ms + 300, 0]
            ids.append(token)
            row.n += 1
        assert row.filled + len(ids) <= self.slots
        return [np.array(ids, int)]


def duet(seed: int = 0, **settings) -> LiveSession:
    return LiveSession(Metronome(), Row(()), seed, Settings(**settings))


def play(session: LiveSession, seed: int, n_notes: int, begin: int = 0) -> int:
    """Plays a random piece; when its last key goes up."""
    events = as_events(without_restrikes(random_performance(np.random.default_rng(seed), n_notes)))
    for event in events:
        session.apply({**event, "t": event["t"] + begin})
        session.step(0)
    return events[-1]["t"] + begin


def listen(session: LiveSession, until: int) -> list:
    notes = []
    while session.has_work(until):
        notes += session.step(until)
    return notes


@pytest.mark.parametrize("preset", ["aria", "pedal"])
def test_what_is_played_becomes_the_tokens_of_the_performance(preset):
    tokenizer = Tokenizer.preset(preset)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        piece = without_restrikes(random_performance(rng, 40))
        pedals = np.zeros(12, PEDAL)
        pedals["tick"] = np.sort(rng.choice(int(piece.notes["end"].max()), 12, replace=False))
        pedals["tick"] += piece.notes["start"][0]
        pedals["value"] = np.tile([127, 0], 6)
        piece = Performance(500, piece.notes, pedals)
        listener = Listener(tokenizer, opening(tokenizer).tolist())
        for event in as_events(piece):
            listener.commit(event["t"])
            arguments = {name: event[name] for name in event if name != "type"}
            getattr(listener, event["type"])(**arguments)
        listener.end_all(int(max(piece.notes["end"].max(), pedals["tick"].max())) + 1)
        assert listener.ids == tokenizer.encode(piece, add_eos=False).tolist()


def test_a_growing_prompt_is_read_as_one_that_is_there_at_once(duet_model):
    weights = decoder_weights(duet_model)
    ids = TOKENIZER.encode(random_performance(np.random.default_rng(0), 30))[:90].astype(np.int32)
    expected, _ = jax.jit(prefill)(weights, ids, np.int32(len(ids)))
    cache, at, extend = empty_cache(weights, 1, 128), 0, jax.jit(extend_cache)
    for length in (16, 16, 5, 16, 16, 16, 5):
        chunk = np.zeros(16, np.int32)
        chunk[:length] = ids[at : at + length]
        logits, cache = extend(weights, cache, chunk, at, length)
        at += length
    np.testing.assert_allclose(logits, expected[0], atol=1e-4)  # other orders of float32 sums
    # One more token, beside a row that waits: as if the prompt had been longer by it.
    waiting = empty_cache(weights, 1, 128)
    both, (_, idle) = jax.jit(decode_rows)(
        weights, (cache, waiting), np.array([7, 9]), np.array([90, 0]), np.array([True, False])
    )
    longer, _ = jax.jit(prefill)(weights, np.append(ids, 7).astype(np.int32), np.int32(91))
    np.testing.assert_allclose(both[0], longer[0], atol=1e-4)
    assert idle[0].keys[:, :, 1:].sum() == 0


def test_draws_with_settings_as_data_are_those_of_min_p():
    logits = jax.random.normal(jax.random.key(0), (4, 50)) * 4
    keys = jax.random.split(jax.random.key(1), 4)
    expected = MinP(temperature=0.7, p=0.1).draw(logits, keys)
    drawn = draw_min_p(logits, keys, np.full(4, 0.7, np.float32), np.full(4, 0.1, np.float32))
    assert drawn.tolist() == expected.tolist()


def test_the_answer_begins_at_the_hand_over_and_stays_in_order():
    session = duet()
    end = play(session, 0, 30)
    session.apply({"type": "hand_over", "t": end + 137, "lead": 60})
    notes = listen(session, end + 12_000)
    assert len(notes) > 5
    onsets = [note.onset for note in notes]
    assert onsets == sorted(onsets)
    assert onsets[0] >= end + 137 + 60
    assert [note.index for note in notes] == list(range(len(notes)))
    assert end + 12_000 < session.played_until < end + 25_000  # not much more than was asked for
    decoded = TOKENIZER.decode(session.ids).notes
    assert decoded["pitch"][-len(notes) :].tolist() == [note.pitch for note in notes]


def test_held_notes_wait_outside_until_their_end_is_known():
    session = duet()
    session.apply({"type": "note_on", "t": 0, "pitch": 60, "velocity": 80})
    session.apply({"type": "note_on", "t": 100, "pitch": 64, "velocity": 80})
    session.apply({"type": "note_off", "t": 300, "pitch": 64})
    session.apply({"type": "tick", "t": 4999})
    assert session.ids == opening(TOKENIZER).tolist()
    session.apply({"type": "tick", "t": 5000})  # no duration is longer
    assert TOKENIZER.decode(session.ids).notes["end"].tolist() == [5000, 300]
    session.apply({"type": "note_on", "t": 6000, "pitch": 62, "velocity": 80})
    session.apply({"type": "hand_over", "t": 6500})
    assert TOKENIZER.decode(session.ids).notes["end"].tolist() == [5000, 300, 6500]


def test_taking_over_drops_what_was_not_heard():
    session = duet()
    end = play(session, 1, 20)
    session.apply({"type": "hand_over", "t": end})
    notes = listen(session, end + 15_000)
    at = notes[4].onset + 1
    heard = [note for note in notes if note.onset < at]
    session.apply({"type": "note_on", "t": at, "pitch": 40, "velocity": 50})
    assert session.turn == "player"
    session.apply({"type": "note_off", "t": at + 400, "pitch": 40})
    pitches = TOKENIZER.decode(session.ids).notes["pitch"].tolist()
    assert pitches[20:] == [*(note.pitch for note in heard), 40]


def test_an_answer_is_taken_back():
    session = duet()
    end = play(session, 2, 20)
    before = session.ids[:]
    session.apply({"type": "hand_over", "t": end})
    assert listen(session, end + 5000)
    session.apply({"type": "undo", "t": end + 5000})
    assert session.ids == before and session.turn == "player"
    # Time stood still: what is played now follows what was played before.
    session.apply({"type": "note_on", "t": end + 5100, "pitch": 60, "velocity": 60})
    session.apply({"type": "hand_over", "t": end + 5200})
    starts = TOKENIZER.decode(session.ids).notes["start"]
    assert 90 <= starts[-1] - (end - session.recording[0]["t"]) <= 110


def test_density_makes_waits_likelier_or_less_so(duet_model):
    ids_W, words = duet_words(TOKENIZER, decoder_weights(duet_model))
    logits = np.zeros((2, len(ids_W)), np.float32)
    tilted = jax.jit(_tilted)(logits, words.grammar, np.array([1000, 1000]), np.array([0.0, 2.0]))
    index = {
        token: int(np.flatnonzero(ids_W == TOKENIZER.id_of(token))[0])
        for token in (("onset", 1000), ("onset", 2500), "<T>", ("piano", 60, 60), ("dur", 90))
    }
    assert not tilted[0].any()
    expected = [0, -3.0, -8.0, 0, 0]  # 2 a second, of 1.5 s and of the 4 s until the segment ends
    np.testing.assert_allclose(tilted[1, list(index.values())], expected, rtol=1e-6)


def test_silence_and_length_end_turns():
    session = duet(silence_ms=800, length_ms=3000)
    end = play(session, 3, 12)
    session.apply({"type": "tick", "t": end + 790})
    assert not session.wants_hand_over
    session.apply({"type": "tick", "t": end + 800})
    assert session.wants_hand_over
    session.apply({"type": "hand_over", "t": end + 800})
    notes = listen(session, end + 100_000)
    assert session.end_of_answer == end + 3800
    assert all(note.onset < end + 3800 for note in notes)


def test_bars_are_dropped_without_a_gap():
    session = duet()
    end = play(session, 4, 60)
    session.apply({"type": "hand_over", "t": end})
    onsets, lengths, until = [], [], end
    while len(onsets) < 500:
        until += 1000
        onsets += [note.onset for note in listen(session, until)]
        lengths.append(len(session.ids))
    assert sum(np.diff(lengths) < 0) >= 3
    assert set(np.diff(onsets)) == {300}  # as if nothing had happened


def test_a_player_may_go_on_for_ever():
    session = duet()
    end = play(session, 4, 400)
    assert len(session.ids) < Metronome.slots
    session.apply({"type": "hand_over", "t": end})
    pitches = TOKENIZER.decode(session.ids).notes["pitch"].tolist()
    assert pitches == [30 + i % 60 for i in range(400)][-len(pitches) :]
    assert len(pitches) > 60


def whole_evening(
    session: LiveSession,
    rng: np.random.Generator,
    beside: LiveSession | None = None,
    turns: tuple[int, ...] = tuple(range(6)),
) -> None:
    """Everything that can happen, with as much work between the events as `rng` says."""

    def work(until: int) -> None:
        for _ in range(int(rng.integers(0, 6))):
            session.step(until)
            if beside is not None:
                beside.step(until)

    def event(t: int, type: str, **rest) -> None:
        session.apply({"type": type, "t": t, **rest})
        work(t + 2000)

    t = 0
    for turn in turns:
        for on in as_events(without_restrikes(random_performance(np.random.default_rng(turn), 25))):
            session.apply({**on, "t": on["t"] + t})
            work(0)
        t = session.now + 50
        event(t, "hand_over", lead=int(rng.integers(0, 100)))
        for _ in range(int(rng.integers(5, 15))):
            t += int(rng.integers(100, 900))
            event(t, "tick")
            listen(session, t + int(rng.integers(0, 3000)))
        if turn == 1:
            event(t, "settings", temperature=0.5, density=1.0)
            t += 700
        if turn == 2:
            event(t, "takes")
            listen(session, t)
            event(t + 10, "choose", take=1)
        elif turn == 3:
            event(t, "undo")
        elif turn == 4:
            event(t, "resync", lead=30)
            event(t + 900, "take_over")
        elif turn == 5:
            event(t, "take_over")


@pytest.mark.parametrize("seed", range(5))
def test_a_recording_plays_again_whatever_the_clock_did(seed):
    session = duet(seed=5)
    whole_evening(session, np.random.default_rng(seed))
    assert session.n_turns == 6
    again = replay(Metronome(), Row(()), session.recording, seed=5)
    assert again.ids == session.ids
    assert replay(Metronome(), Row(()), session.recording, seed=6).ids != session.ids


def test_a_model_plays_a_recording_again_and_compiles_nothing(duet_engine):
    """To the last bit, though what was read when differs, and someone plays beside it."""
    compiled = []

    def listener(event: str, duration: float, **kwargs) -> None:
        if "compile" in event:
            compiled.append(event)

    # All of them: other tests have given them back in another order, and two must be of one group.
    while duet_engine.take_row() is not None:
        pass
    rows = duet_engine.rows[:3]
    first, beside = (LiveSession(duet_engine, row, seed=5) for row in rows[:2])
    monitoring.register_event_duration_secs_listener(listener)
    try:
        play(beside, 3, 30)
        beside.apply({"type": "hand_over", "t": beside.now})
        whole_evening(first, np.random.default_rng(1), beside, (1, 2))
        again = replay(duet_engine, rows[2], first.recording, seed=5)
    finally:
        monitoring.unregister_event_duration_listener(listener)
    assert again.ids == first.ids and first.n_turns == 2
    assert not compiled
    # What is in the cache is what reading all of it at once gives.
    first.apply({"type": "hand_over", "t": first.now})
    while first._reader.has_work:
        first.step(0)
    ids = np.asarray(first.ids + [0] * (512 - len(first.ids)), np.int32)
    expected, _ = jax.jit(prefill)(duet_engine.weights, ids, np.int32(len(first.ids)))
    np.testing.assert_allclose(first.row.logits, expected[0], atol=1e-3)
    for row in duet_engine.rows:
        duet_engine.give_back(row)


def test_what_is_too_short_or_out_of_range_is_refused(random_model):
    with pytest.raises(UserError, match="at least 512"):
        Engine(decoder_weights(random_model(max_seq_len=256)), TOKENIZER)
    session = duet()
    with pytest.raises(UserError, match="temperature 9"):
        session.apply({"type": "settings", "t": 0, "temperature": 9})
    assert session.settings == Settings() and not session.recording
    assert CHUNKS[-1] <= RESERVE
