"""Prompts keep whole notes; continuations keep the prompt's clock; nothing generated is lost."""

import importlib

import jax
import numpy as np
import pytest

from aria_jax.generate.continuation import (
    Continuation,
    check_memory,
    continue_prompt,
    make_prompt,
    prompt_of_file,
)
from aria_jax.generate.decoding import Decoding, decode
from aria_jax.generate.sampler import Temperature
from aria_jax.generate.weights import decoder_weights
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, PEDAL, Performance, midi_bytes, read_midi, write_midi
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind

ARIA = Tokenizer.preset("aria")


def played(starts_ms, ends_ms, pitches, pedals=()):
    notes = np.zeros(len(starts_ms), NOTE)
    notes["start"], notes["end"], notes["pitch"] = starts_ms, ends_ms, pitches
    notes["velocity"] = 70
    return Performance(500, notes, np.array(list(pedals), PEDAL))


PIECE = played(
    [1000, 1500, 2000, 3000, 9000],
    [1400, 4900, 2200, 3100, 9500],
    [60, 62, 64, 65, 67],
    pedals=[(2050, 127, 0), (4000, 0, 0)],
)


@pytest.mark.parametrize(
    ("limits", "pitches"),
    [
        ({"notes": 3}, [60, 62, 64]),
        ({"seconds": 1.0}, [60, 62, 64]),  # a note that begins at the limit belongs to it
        ({"seconds": 0.999}, [60, 62]),
        ({"seconds": 100.0}, [60, 62, 64, 65, 67]),
        ({"notes": 100}, [60, 62, 64, 65, 67]),
    ],
)
def test_prompts_hold_the_notes_that_begin_in_them(limits, pitches):
    ids = make_prompt(PIECE, ARIA, **limits)
    assert ARIA.decode(ids).notes["pitch"].tolist() == pitches
    assert ids[-1] != ARIA.eos_id


def test_the_last_notes_of_a_prompt_ring_on_past_its_end():
    notes = ARIA.decode(make_prompt(PIECE, ARIA, seconds=1.0)).notes
    lasting = {int(note["pitch"]): int(note["end"] - note["start"]) for note in notes}
    assert lasting[62] == 3400  # held by the key until 4.9 s
    assert lasting[64] == 2000  # released at 2.2 s, held by the pedal until 4.0 s


def test_prompt_lengths_must_make_sense():
    both = {"seconds": 1.0, "notes": 2}
    nothing = [{name: value} for name in ("seconds", "notes") for value in (0, -1)]
    for limits in ({}, both, *nothing, {"seconds": float("nan")}, {"seconds": float("inf")}):
        with pytest.raises(UserError):
            make_prompt(PIECE, ARIA, **limits)


def test_what_holds_no_note_is_no_prompt(tmp_path):
    silent = played([], [], [], pedals=[(0, 127, 0), (500, 0, 0)])
    with pytest.raises(UserError, match="no notes"):
        make_prompt(silent, ARIA, seconds=15.0)
    write_midi(silent, tmp_path / "silent.mid")
    with pytest.raises(UserError, match=r"silent\.mid.*no.notes"):
        prompt_of_file(tmp_path / "silent.mid", ARIA, seconds=15.0)


def tokens(*tokens):
    return np.array([ARIA.id_of(token) for token in tokens])


HEADER = (("prefix", "instrument", "piano"), "<S>")


def test_the_continuation_goes_on_by_the_prompts_clock():
    prompt = tokens(*HEADER, ("piano", 60, 70), ("onset", 0), ("dur", 100), "<T>",
                    ("piano", 62, 70), ("onset", 100), ("dur", 3000))  # fmt: skip
    added = tokens(("piano", 64, 70), ("onset", 350), ("dur", 100), "<T>",
                   ("piano", 65, 70), ("onset", 20), ("dur", 50), "<E>")  # fmt: skip
    one = Continuation(prompt, added, ARIA)
    assert one.full.notes["start"].tolist() == [0, 5100, 5350, 10020]
    assert one.prompt.notes["pitch"].tolist() == [60, 62]
    assert one.prompt.notes["end"].tolist() == [100, 8100]
    assert one.continuation.notes["start"].tolist() == [5350, 10020]
    assert one.prompt_end_ms == 5100
    assert one.continuation_from_zero.notes["start"].tolist() == [250, 4920]
    assert one.continuation_from_zero.notes["end"].tolist() == [350, 4970]
    assert (one.n_notes, one.seconds, one.ended) == (2, 4.92, True)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_note_begun_in_the_prompt_is_the_continuations(cut):
    note = tokens(("piano", 62, 70), ("onset", 900), ("dur", 30))
    prompt = np.concatenate(
        [tokens(*HEADER, ("piano", 60, 70), ("onset", 0), ("dur", 100)), note[:cut]]
    )
    one = Continuation(prompt, note[cut:], ARIA)
    assert one.prompt.notes["pitch"].tolist() == [60]
    assert one.continuation.notes[["pitch", "start", "end"]].tolist() == [(62, 900, 930)]
    assert len(one.full.notes) == 2


def test_variations_and_progress(tiny_model, piano_prompt):
    weights = decoder_weights(tiny_model)
    seen = []
    settings = Decoding(max_tokens=30, chunk=10, sampler=Temperature(temperature=1.0))
    found = continue_prompt(
        weights, ARIA, piano_prompt, n=3, seed=1, settings=settings, progress=seen.append
    )
    assert [pace.n_tokens for pace in seen] == [10, 20, 30]
    assert seen[-1].n_notes == sum(c.n_notes for c in found)
    assert seen[-1].music_seconds == pytest.approx(max(c.seconds for c in found))
    assert "notes/s" in str(seen[-1])
    (alone,) = continue_prompt(weights, ARIA, piano_prompt, n=1, seed=1, settings=settings)
    np.testing.assert_array_equal(alone.ids, found[0].ids)


def test_more_than_the_memory_holds_is_refused_before_the_work(tiny_model):
    weights = decoder_weights(tiny_model)
    check_memory(weights, 1, 100, guided=True)
    with pytest.raises(UserError, match=r"ask for at most [0-9,]+, and for more with another seed"):
        check_memory(weights, 10**9, 100, guided=False)


def test_no_more_is_generated_than_the_model_sees(random_model, piano_prompt):
    weights = decoder_weights(random_model(max_seq_len=24))
    (one,) = continue_prompt(
        weights, ARIA, piano_prompt, n=1, seed=0, settings=Decoding(max_tokens=500)
    )
    assert len(one.ids) == 24 - len(piano_prompt) - 1
    with pytest.raises(UserError, match="takes 32 tokens of the 24"):
        continue_prompt(weights, ARIA, np.tile(piano_prompt, 4), n=1, seed=0, settings=Decoding())


def whole_pieces(model, n, tokens, prompt, seed):
    """`n` generations in batches; checks that each is decoded whole, returns their notes."""
    weights = decoder_weights(model)
    total = 0
    for batch in range(0, n, 100):
        *_, ids = decode(
            weights,
            ARIA,
            prompt,
            n_sequences=min(100, n - batch),
            key=jax.random.key(seed + batch),
            settings=Decoding(max_tokens=tokens, sampler=Temperature(temperature=1.0)),
        )
        for row in ids:
            end = np.flatnonzero(row == ARIA.eos_id)
            row = row[: end[0] + 1] if len(end) else row
            kind = ARIA.kind[row]
            n_events = int(np.isin(kind, (Kind.NOTE, Kind.DRUM)).sum())
            n_loose = int((kind == Kind.TIME).sum()) + int(np.isin(row, [1, ARIA.dim_id]).sum())
            drums = int((kind == Kind.DRUM).sum())
            # Every token belongs to a decoded event or is a <T>, <D> or <E>.
            assert len(row) == 3 * (n_events - drums) + 2 * drums + n_loose
            decoded = ARIA.decode(np.concatenate([prompt, row]))
            assert len(decoded.notes) == ARIA.n_notes(prompt) + n_events
            assert (decoded.notes["end"] > decoded.notes["start"]).all()
            assert len(read_midi(midi_bytes(decoded)).notes) == len(decoded.notes)
            total += n_events
    return total


@pytest.mark.slow
def test_random_models_generate_whole_pieces(random_model, piano_prompt):
    drums = tokens(("prefix", "instrument", "drum"), *HEADER)
    assert whole_pieces(random_model(seed=3, scale=2.0, n_layers=1), 40, 60, piano_prompt, 0) > 500
    assert whole_pieces(random_model(seed=4, scale=40.0, n_layers=1), 20, 60, drums, 1) > 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_random_generations_are_whole(random_model, piano_prompt, seed):
    """5 random models of different sharpness, 200 generations each."""
    model = random_model(seed=seed, scale=float(4**seed))
    assert whole_pieces(model, 200, 90, piano_prompt, seed) > 2000


def _installed(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def test_generated_midi_opens_in_other_libraries(tiny_model, tmp_path):
    import mido
    from miditoolkit import MidiFile

    write_midi(PIECE, tmp_path / "piece.mid")
    prompt = prompt_of_file(tmp_path / "piece.mid", ARIA, seconds=10)
    (one,) = continue_prompt(
        decoder_weights(tiny_model), ARIA, prompt, n=1, seed=0, settings=Decoding(max_tokens=90)
    )
    path = tmp_path / "whole.mid"
    write_midi(one.full, path)
    written = sorted(read_midi(path).notes[["pitch", "start"]].tolist())
    clock, onsets = 0, []
    for message in mido.merge_tracks(mido.MidiFile(path).tracks):
        clock += message.time
        if message.type == "note_on" and message.velocity > 0:
            onsets.append((message.note, clock))
    assert sorted(onsets) == written
    tracks = MidiFile(str(path)).instruments
    if symusic := _installed("symusic"):
        tracks = [*tracks, *symusic.Score(str(path)).tracks]
        assert len(tracks) == 2
    for track in tracks:
        assert sorted((note.pitch, note.start) for note in track.notes) == written
    n_prompt = len(one.prompt.notes)
    assert len(written) > n_prompt
