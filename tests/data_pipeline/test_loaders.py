"""What every loader promises: any rows, any start, any number of workers, the same batches."""

import subprocess
import sys
from functools import partial
from itertools import islice

import numpy as np
import pytest

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError
from data_pipeline.loaders.slice_batches import contrastive_pairs, label_values, labelled_slices
from data_pipeline.loaders.windows import lm_windows
from data_pipeline.shards import TokenShards
from data_pipeline.tokenizers import Tokenizer

COMMON = {"split": "train", "seq_len": 96, "global_batch": 6, "seed": 3, "augment": AugmentConfig()}
SLICES = {"min_slice_notes": 8, "max_slice_notes": 40}
LABELS = {"label": "composer", "class_names": ("bach", "chopin", "liszt")}
LOADERS = {
    "concat": partial(lm_windows, **COMMON),
    "concat-dim": partial(lm_windows, **COMMON, add_dim=True),
    "best-fit": partial(lm_windows, **COMMON, packing="best-fit"),
    "pairs": partial(contrastive_pairs, **COMMON, **SLICES),
    "pairs-consecutive": partial(contrastive_pairs, **COMMON, **SLICES, consecutive=True),
    "pairs-same-composer": partial(contrastive_pairs, **COMMON, **SLICES, composer_group=3),
    "labelled": partial(labelled_slices, **COMMON, **SLICES, **LABELS),
    "evaluation": partial(labelled_slices, **COMMON, **LABELS, slice_notes=50, shuffle=False),
}
N_STEPS = 9  # of six rows: more than an epoch of 23 pieces


@pytest.fixture(params=LOADERS)
def loader(request, corpus):
    return partial(LOADERS[request.param], corpus)


def first(stream, n_steps=N_STEPS, start_step=0):
    return list(islice(stream.iterate(start_step), n_steps))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            assert a[key].dtype == b[key].dtype


def test_any_rows_of_a_batch_are_those_of_the_whole_batch(loader):
    """Each row depends on its own number alone, however many are asked for, in whatever order."""
    whole, stream = first(loader()), loader()
    for ranges in (((0, 6),), ((2, 3),), ((0, 1), (4, 6)), ((3, 6), (0, 2)), ((1, 1),)):
        chosen = np.concatenate([np.arange(*rows) for rows in ranges])
        expected = [{key: rows[chosen] for key, rows in batch.items()} for batch in whole]
        assert_same([stream.rows(step, *ranges) for step in range(N_STEPS)], expected)
        assert_same(list(islice(stream.iterate(0, *ranges), N_STEPS)), expected)
        assert_same(list(islice(stream.iterate(5, *ranges), N_STEPS - 5)), expected[5:])


@pytest.mark.parametrize("rows", [(-1, 2), (0, 7), (3, 2)])
def test_rows_that_do_not_exist_are_refused(loader, rows):
    with pytest.raises(IndexError, match=f"rows {rows[0]}:{rows[1]} of 6"):
        loader().rows(0, rows)


def test_resuming_in_the_middle_of_an_epoch_equals_going_on(loader):
    whole = first(loader())
    for start in (1, 4, 7):
        assert_same(first(loader(), N_STEPS - start, start), whole[start:])


def test_batches_differ_by_step_and_seed(loader, request):
    one, other, reseeded = *first(loader(), 2), first(loader(seed=4), 1)[0]
    key = "inputs" if "inputs" in one else "tokens"
    assert (one[key] != other[key]).any()
    assert (one[key] != reseeded[key]).any()


def test_worker_processes_change_nothing(corpus):
    make, rows = partial(LOADERS["pairs"], corpus), ((0, 1), (3, 5))
    expected = [make().rows(step, *rows) for step in range(2, 7)]
    assert_same(list(islice(make(workers=2).iterate(2, *rows), 5)), expected)


def test_finite_stream_ends_with_padding_rows(corpus):
    stream = LOADERS["labelled"](corpus, epochs=1)
    batches = list(stream.iterate())
    assert len(batches) == stream.n_steps == 4
    pieces = np.concatenate([batch["piece"] for batch in batches])
    assert sorted(pieces) == [-1, *range(23)]  # every piece exactly once, and one row to fill up
    padding = pieces == -1
    assert (np.concatenate([batch["n_tokens"] for batch in batches])[padding] == 0).all()
    assert stream.rows(3, (5, 6))["piece"].tolist() == [-1]
    assert list(stream.iterate(4)) == []


def test_every_piece_twice_in_two_epochs(corpus):
    stream = LOADERS["labelled"](corpus, epochs=2)
    pieces = [batch["piece"] for batch in stream.iterate()]
    counts = np.bincount(np.concatenate(pieces) + 1, minlength=24)
    assert counts[1:].tolist() == [2] * 23


def test_evaluation_covers_every_note_in_order(corpus):
    tokenizer = Tokenizer.preset("aria")
    stream = labelled_slices(
        corpus, **{**COMMON, "augment": None, "seq_len": 512}, **LABELS,
        slice_notes=50, shuffle=False, epochs=1,
    )  # fmt: skip
    rows = [row for batch in stream.iterate() for row in zip(*batch.values(), strict=True)]
    shards = TokenShards(corpus, "train")
    notes = {piece: [] for piece in range(23)}
    for tokens, eos, label, piece, n_tokens in rows:
        if piece < 0:
            continue
        assert n_tokens == eos + 1 == (tokens != tokenizer.pad_id).sum()
        assert tokens[eos] == tokenizer.eos_id
        assert LABELS["class_names"][label] == shards[piece].meta["labels"]["composer"]
        notes[piece].append(tokenizer.decode(tokens[:n_tokens]).notes["pitch"])
    for piece, slices in notes.items():
        expected = tokenizer.decode(shards[piece].ids).notes["pitch"]
        assert [len(part) for part in slices[:-1]] == [50] * (len(slices) - 1)
        np.testing.assert_array_equal(np.concatenate(slices), expected)


def test_label_values(corpus):
    assert label_values(corpus, "composer") == ("bach", "chopin", "liszt")
    with pytest.raises(UserError, match=r"no piece has a label .*composer, composition"):
        label_values(corpus, "mood")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 0}, "global_batch=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_unusable_arguments_are_explained(loader, change, message):
    with pytest.raises(UserError, match=message):
        loader(**change)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        ("concat", {"packing": "tight"}, "packing='tight' is none of concat, best-fit"),
        ("concat", {"seq_len": 1}, "seq_len=1"),
        ("pairs", {"min_slice_notes": 50}, "min_slice_notes=50 must be positive and at most"),
        ("pairs", {"composer_group": 0}, "composer_group=0"),
        ("labelled", {"class_names": ("ravel",)}, "no piece of split 'train' has 'composer'"),
    ],
)
def test_unusable_settings_are_explained(corpus, make, change, message):
    with pytest.raises(UserError, match=message):
        LOADERS[make](corpus, **change)


def test_loading_needs_no_jax(corpus):
    """In a fresh interpreter; only reading ahead does, by way of grain."""
    program = (
        "import sys; from data_pipeline.loaders.windows import lm_windows; "
        f"s = lm_windows({str(corpus)!r}, split='train', seq_len=64, global_batch=2, seed=0); "
        "print(s[0]['inputs'].shape, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 64) False", done.stderr
    assert done.stderr == ""


def test_sizes_are_known_beforehand(corpus):
    stream = lm_windows(corpus, **COMMON, epochs=1)
    n_tokens = int(TokenShards(corpus, "train").lengths.sum())
    n_rows = -(-(n_tokens - 1) // COMMON["seq_len"])
    assert (stream.global_batch, stream.n_examples) == (6, n_rows)
    assert (
        stream.steps_per_epoch == stream.n_steps == len(list(stream.iterate())) == -(-n_rows // 6)
    )


@pytest.mark.parametrize("make", [contrastive_pairs, partial(labelled_slices, **LABELS)])
def test_a_slower_tempo_cuts_no_note_off_a_slice(corpus, make):
    tokenizer = Tokenizer.preset("aria")
    stream = make(corpus, **{**COMMON, "seq_len": 1024}, min_slice_notes=200, max_slice_notes=300)
    for batch in first(stream, 20):
        rows, ends = batch["tokens"].reshape(-1, 1024), batch["eos"].ravel()
        for tokens, eos in zip(rows, ends, strict=True):
            assert tokenizer.tokens[tokens[eos - 1]][0] == "dur"
            assert tokenizer.events(tokens)[1][0] == 0
            assert tokens[eos] == tokenizer.eos_id and (tokens[eos + 1 :] == tokenizer.pad_id).all()
