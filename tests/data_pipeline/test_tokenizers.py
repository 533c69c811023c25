"""What every scheme of tokens keeps of the protocol."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, PROGRAM, Performance, resolve_overlaps
from data_pipeline.settings import AugmentConfig
from data_pipeline.tokenizers import SCHEMES, Tokenizer, augmentations_left_out, load_scheme
from data_pipeline.tokenizers.base import COMMON_SPECIAL, sounding_notes
from data_pipeline.vocabulary import INSTRUMENTS, Kind

HASHES = {
    "aria": "252f3ab5c4e75ccd00812fd137a527d950ba673bb71d55694e1560d0a62b8023",
    "pedal": "a8eeb4540542c4b7400a538ff402f8333ec7e242f1137fbcb8491cabee8b3813",
    "musenet": "42edadc17dcd119b9e9664a4e29df4a8d279bd72a5467f765b17d1b2d4af4791",
    "piano-roll": "2368e98d80c24996ad01e251b12f15fe2bed8ff3d76a7f2c522d40539865eb83",
}
"""Corpora and checkpoints are bound to these: a change makes all of them useless."""


def piano(seed: int, n: int) -> Performance:
    """Piano notes on a grid of 10 ms; no key is struck while it sounds."""
    rng = np.random.default_rng(seed)
    notes = np.zeros(n, NOTE)
    notes["start"] = np.cumsum(rng.integers(0, 60, n)) * 10
    notes["start"] -= notes["start"][0]
    notes["end"] = notes["start"] + rng.integers(1, 200, n) * 10
    notes["pitch"] = 21 + (np.arange(n) * 37) % 88
    notes["velocity"] = rng.integers(1, 13, n) * 10
    return Performance(500, notes)


def band(seed: int, n: int) -> Performance:
    """Several instruments and drums on a grid of 50 ms, every value one that a token has."""
    rng = np.random.default_rng(seed)
    performance = piano(seed, n)
    notes = performance.notes
    notes["channel"] = rng.choice([0, 1, 2, 9], n)
    is_drum = notes["channel"] == 9
    notes["pitch"] = np.where(is_drum, 35 + np.arange(n) % 47, notes["pitch"])
    notes["start"] = notes["start"] // 50 * 50
    notes["end"] = notes["start"] + np.where(is_drum, 50, rng.integers(1, 40, n) * 50)
    programs = np.array([(0, 0, 0), (0, 40, 1), (0, 32, 2)], PROGRAM)
    return resolve_overlaps(Performance(500, notes, programs=programs))


@pytest.fixture(params=list(SCHEMES))
def tokenizer(request):
    if request.param in ("remi", "midi-like"):
        pytest.importorskip("miditok")
    return Tokenizer.preset(request.param)


def sounds_of(performance: Performance) -> list:
    """Rows of what sounds, drum hits without their length."""
    sounds = sounding_notes(performance)
    sounds["end"][sounds["instrument"] == len(INSTRUMENTS)] = 0
    return sorted(sounds.tolist())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["musenet", "piano-roll"]), st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_every_instrument_comes_back_as_it_was(name, seed, n):
    tokenizer, performance = Tokenizer.preset(name), band(seed, n)
    decoded = tokenizer.decode(tokenizer.encode(performance))
    assert sounds_of(decoded) == sounds_of(performance)


def test_any_ids_decode_to_notes_that_a_file_can_hold(tokenizer):
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 300):
        ids = rng.integers(0, tokenizer.vocab_size, n)
        at, onset_ms = tokenizer.events(ids)
        assert len(at) == len(onset_ms) and (np.diff(at) > 0).all()
        notes = tokenizer.decode(ids).notes
        assert (notes["end"] >= notes["start"]).all() and (notes["pitch"] < 128).all()
    with pytest.raises(UserError, match="must lie in"):
        tokenizer.decode(np.array([tokenizer.vocab_size]))


def test_augmentation_moves_all_notes_alike(tokenizer):
    ids = tokenizer.encode(piano(3, 40))
    window = np.concatenate([ids, ids[: len(ids) // 2]])
    config = AugmentConfig(tempo=0, pitch=5, velocity=0, mixup=False)
    shifts = set()
    for seed in range(8):
        changed = tokenizer.augment(window, config, np.random.default_rng(seed))
        assert changed.dtype == np.uint16 and (changed != tokenizer.pad_id).all()
        end = int(np.argmax(changed == tokenizer.eos_id)) + 1
        before, after = (tokenizer.decode(one).notes for one in (ids, changed[:end]))
        (shift,) = set((after["pitch"].astype(int) - before["pitch"]).tolist())
        shifts.add(shift)
        assert np.array_equal(before["start"], after["start"])
    assert len(shifts) > 2 and max(map(abs, shifts)) <= 5


def test_what_a_scheme_cannot_change_is_said_or_refused(tokenizer):
    usual = AugmentConfig()
    if tokenizer.preset_name in ("aria", "pedal"):
        assert augmentations_left_out(tokenizer, AugmentConfig(rubato=0.1)) == ()
        return
    (said,) = augmentations_left_out(tokenizer, usual)
    assert "mixup" in said and ("tempo" in said) == (tokenizer.preset_name == "remi")
    transposed = AugmentConfig(tempo=0, velocity=0, mixup=False)
    assert augmentations_left_out(tokenizer, transposed) == ()
    with pytest.raises(UserError, match=r"cannot augment by rubato=0\.1; it can by pitch"):
        augmentations_left_out(tokenizer, AugmentConfig(rubato=0.1))


def test_what_a_corpus_can_hold_holds_it_transposed(tokenizer):
    occurring = np.zeros(tokenizer.vocab_size, bool)
    occurring[tokenizer.encode(piano(5, 60))] = True
    reachable = tokenizer.reachable(occurring)
    config = AugmentConfig(pitch=12, velocity=3, mixup=False, tempo=0)
    for seed in range(6):
        changed = tokenizer.augment(
            tokenizer.encode(piano(5, 60)), config, np.random.default_rng(seed)
        )
        assert np.isin(changed, reachable).all()
    assert len(reachable) < 3000 and np.isin(np.flatnonzero(occurring), reachable).all()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "miditok", None)
    with pytest.raises(UserError, match=r"pip install 'aria-jax\[miditok\]'"):
        load_scheme("remi")


def test_released_vocabularies_keep_their_hashes():
    assert {name: Tokenizer.preset(name).hash for name in HASHES} == HASHES


def test_the_first_ids_are_common_to_all(tokenizer):
    assert tuple(tokenizer.tokens[:4]) == COMMON_SPECIAL
    assert tokenizer.vocab_size == len(set(tokenizer.tokens)) == len(tokenizer.kind) <= 1 << 16
    assert Tokenizer.preset(tokenizer.preset_name) is tokenizer


def test_one_token_of_each_note_counts_it_and_says_when(tokenizer):
    performance = piano(0, 80)
    ids = tokenizer.encode(performance)
    assert ids.dtype == np.uint16 and ids[-1] == tokenizer.eos_id
    assert np.array_equal(tokenizer.encode(performance, add_eos=False), ids[:-1])
    assert tokenizer.n_notes(ids) == len(tokenizer.note_positions(ids)) == 80
    decoded = tokenizer.decode(ids)
    assert len(decoded.notes) == 80
    at, onset_ms = tokenizer.events(ids)
    is_note = np.isin(tokenizer.kind[ids[at]], (Kind.NOTE, Kind.DRUM))
    assert np.array_equal(np.sort(onset_ms[is_note]), decoded.notes["start"])


def test_a_slice_is_a_piece_of_its_own(tokenizer):
    ids = tokenizer.encode(piano(1, 60))
    note_at = tokenizer.note_positions(ids)
    part = tokenizer.slice_ids(ids, note_at, 20, 45)
    assert tokenizer.n_notes(part) == 25 and part[-1] == tokenizer.eos_id
    whole, sliced = tokenizer.decode(ids).notes[20:45], tokenizer.decode(part).notes
    assert sorted(whole["pitch"]) == sorted(sliced["pitch"])
    assert sliced["start"][0] < (2000 if tokenizer.preset_name == "remi" else 1)  # a bar
    assert tokenizer.n_notes(tokenizer.slice_ids(ids, note_at, 60, 80)) == 0


def test_a_piece_is_decoded_once_for_all_its_slices(tokenizer, monkeypatch):
    ids, decoded = tokenizer.encode(piano(2, 60)), []
    decode = type(tokenizer)._decode_for_encoding
    monkeypatch.setattr(
        type(tokenizer),
        "_decode_for_encoding",
        lambda self, ids: decoded.append(len(ids)) or decode(self, ids),
    )
    at = tokenizer.note_positions(ids)
    slices = [tokenizer.slice_ids(ids, at, start, start + 10) for start in range(0, 60, 10)]
    assert sum(map(tokenizer.n_notes, slices)) == 60
    assert len(decoded) <= 1


def test_a_grammar_reads_every_piece_and_finds_what_is_out_of_place(tokenizer):
    grammar = tokenizer.grammar()
    if grammar is None:
        pytest.skip("no grammar")
    ids = tokenizer.encode(piano(2, 50))
    assert grammar.first_error(ids) == -1
    assert grammar.first_error(np.append(ids, ids[-2])) == len(ids)  # nothing follows <E>
    assert grammar.first_error(ids[1:]) >= 0 or ids[0] != tokenizer.bos_id


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(UserError, match="did you mean 'aria'"):
        Tokenizer.preset("arias")
