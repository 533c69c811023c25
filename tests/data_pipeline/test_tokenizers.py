"""What every scheme of tokens keeps of the protocol."""

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, Performance
from data_pipeline.tokenizers import SCHEMES, Tokenizer
from data_pipeline.tokenizers.base import COMMON_SPECIAL
from data_pipeline.vocabulary import Kind

HASHES = {
    "aria": "252f3ab5c4e75ccd00812fd137a527d950ba673bb71d55694e1560d0a62b8023",
    "pedal": "a8eeb4540542c4b7400a538ff402f8333ec7e242f1137fbcb8491cabee8b3813",
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


@pytest.fixture(params=list(SCHEMES))
def tokenizer(request):
    return Tokenizer.preset(request.param)


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
    assert sliced["start"][0] == 0
    assert tokenizer.n_notes(tokenizer.slice_ids(ids, note_at, 60, 80)) == 0


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
