"""Loaders lose nothing, repeat exactly, resume anywhere and share batches among hosts."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError
from data_pipeline.loaders import (
    contrastive_pairs,
    label_values,
    labelled_slices,
    lm_windows,
)
from data_pipeline.loaders.packing import pack_best_fit
from data_pipeline.shards import TokenShards, index_name
from data_pipeline.tokenizer import Tokenizer

ARIA = Tokenizer.preset("aria")
COMPOSERS = ("bach", "chopin", "liszt")


def windows(corpus, **options):
    defaults = {"split": "train", "seq_len": 128, "global_batch": 4, "seed": 0, "augment": None}
    return lm_windows(corpus, **(defaults | options))


def pairs(corpus, **options):
    defaults = {"split": "train", "seq_len": 256, "global_batch": 4, "seed": 0}
    notes = {"min_slice_notes": 10, "max_slice_notes": 60, "augment": AugmentConfig()}
    return contrastive_pairs(corpus, **(defaults | notes | options))


def labelled(corpus, **options):
    defaults = {"split": "train", "seq_len": 256, "global_batch": 4, "seed": 0}
    labels = {"label": "composer", "class_names": COMPOSERS}
    return labelled_slices(corpus, **(defaults | labels | options))


LOADERS = {
    "concat": lambda corpus, **o: windows(corpus, augment=AugmentConfig(), **o),
    "best-fit": lambda corpus, **o: windows(
        corpus, packing="best-fit", augment=AugmentConfig(), add_dim=True, **o
    ),
    "pairs": pairs,
    "labelled": labelled,
}


def take(loader, n, start_step=0):
    batches = loader.iterate(start_step)
    return [next(batches) for _ in range(n)]


def assert_same(got, want):
    assert len(got) == len(want) and got
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def corpus_stream(corpus, split="train"):
    shards = TokenShards(corpus, split)
    return np.concatenate([shards[i].ids for i in range(len(shards))])


# --- windows ---


def test_windows_in_order_are_the_corpus(corpus):
    batches = list(windows(corpus, shuffle=False, epochs=1).iterate())
    mask = joined(batches, "loss_mask")
    stream = corpus_stream(corpus)
    np.testing.assert_array_equal(joined(batches, "targets")[mask], stream[1:])
    np.testing.assert_array_equal(joined(batches, "inputs")[mask], stream[:-1])
    for batch in batches:
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        assert batch["segment_ids"].dtype == batch["positions"].dtype == np.int32
        assert batch["loss_mask"].dtype == bool and batch["inputs"].shape == (4, 128)
        np.testing.assert_array_equal(batch["segment_ids"] > 0, batch["inputs"] != ARIA.pad_id)
        np.testing.assert_array_equal(batch["positions"][0], np.arange(128))


def test_each_shuffled_epoch_holds_every_token_in_another_order(corpus):
    # One row a batch: batches end where epochs end, so that epochs can be told apart.
    loader = windows(corpus, global_batch=1, epochs=2)
    batches = list(loader.iterate())
    n = loader.steps_per_epoch
    assert len(batches) == 2 * n
    want = np.bincount(corpus_stream(corpus), minlength=ARIA.vocab_size)
    epochs = []
    for part in (batches[:n], batches[n:]):
        inputs, targets = joined(part, "inputs"), joined(part, "targets")
        epochs.append(targets)
        mask = joined(part, "loss_mask")
        counts = np.bincount(targets[mask], minlength=ARIA.vocab_size)
        missing = want - counts  # the epoch's first token is nobody's target
        assert missing.sum() == 1 and missing.min() == 0
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert not np.array_equal(*epochs)


def test_best_fit_loses_nothing_and_crosses_no_piece(corpus):
    shards = TokenShards(corpus, "train")
    pieces = {shards[i].ids.tobytes() for i in range(len(shards))}
    loader = windows(corpus, packing="best-fit", epochs=1, seq_len=2048)
    assert max(shards.lengths) <= 2048  # whole pieces only
    found = []
    for batch in loader.iterate():
        for row in range(len(batch["inputs"])):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                ids = batch["inputs"][row][here]
                found.append(ids.astype(np.uint16).tobytes())
                np.testing.assert_array_equal(batch["positions"][row][here], np.arange(len(ids)))
                mask = batch["loss_mask"][row][here]
                np.testing.assert_array_equal(batch["targets"][row][here][mask], ids[1:])
                assert mask[:-1].all() and not mask[-1]
            assert not batch["loss_mask"][row][segments == 0].any()
    assert len(found) == len(shards) and set(found) == pieces


def test_best_fit_cuts_long_pieces_and_predicts_across_the_cut(corpus):
    batches = list(windows(corpus, packing="best-fit", epochs=1, seq_len=64).iterate())
    real = joined(batches, "segment_ids") > 0
    stream = corpus_stream(corpus)
    want = np.bincount(stream, minlength=ARIA.vocab_size)
    inputs = joined(batches, "inputs")[real]
    np.testing.assert_array_equal(np.bincount(inputs, minlength=ARIA.vocab_size), want)
    targets = joined(batches, "targets")[joined(batches, "loss_mask")]
    assert len(targets) == len(stream) - len(TokenShards(corpus, "train"))


def test_packing_is_tight_and_whole():
    lengths = np.random.default_rng(0).integers(1, 300, 400)
    plan = pack_best_fit(lengths, 100)
    assert plan.length.sum() == lengths.sum()
    covered = np.zeros(len(lengths), int)
    np.add.at(covered, plan.piece, plan.length)
    np.testing.assert_array_equal(covered, lengths)
    fill = np.add.reduceat(plan.length, plan.first[:-1])
    assert fill.max() <= 100
    assert len(fill) <= 1.03 * lengths.sum() / 100 + 1
    assert pack_best_fit(np.array([60, 60, 40, 40]), 100).first.tolist() == [0, 2, 4]


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_dim_tokens_stand_between_notes_near_the_end(corpus, packing):
    options = {"packing": packing, "shuffle": False, "epochs": 1}
    batches = list(windows(corpus, add_dim=True, **options).iterate())
    inputs = joined(batches, "inputs")
    n_long = int((TokenShards(corpus, "train").lengths > 160).sum())
    assert np.count_nonzero(inputs == ARIA.dim_id) == n_long > 0
    if packing == "concat":
        stream = inputs.reshape(-1)
        after = stream[np.flatnonzero(stream[:-1] == ARIA.dim_id) + 1]
        assert all(ARIA.tokens[i] == "<T>" or ARIA.tokens[i][0] == "piano" for i in after)
        without = stream[(stream != ARIA.dim_id) & (stream != ARIA.pad_id)]
        np.testing.assert_array_equal(without, corpus_stream(corpus))


# --- slices ---


def assert_slice(tokens, eos):
    """One piece: prefix, <S>, first onset 0, <E> at `eos`, padding."""
    assert tokens[eos] == ARIA.eos_id and (tokens[eos + 1 :] == ARIA.pad_id).all()
    assert np.count_nonzero(tokens == ARIA.eos_id) == np.count_nonzero(tokens == ARIA.bos_id) == 1
    at, onset_ms = ARIA.events(tokens[: eos + 1])
    assert len(at) and onset_ms[0] == 0


def test_pairs_are_two_views_of_one_piece(corpus):
    shards = TokenShards(corpus, "train")
    codes, values = shards.label_codes("composition")
    loader = pairs(corpus, epochs=1, augment=None, shuffle=False)
    batches = list(loader.iterate())
    tokens, eos = joined(batches, "tokens"), joined(batches, "eos")
    composition = joined(batches, "composition")
    assert tokens.dtype == eos.dtype == composition.dtype == np.int32
    assert len(values) < len(shards)  # some compositions have two performances
    n = len(shards)
    assert (composition[n:] == -1).all() and len(composition) == 24
    np.testing.assert_array_equal(composition[:n], codes)
    for piece in range(n):
        notes = shards[piece].ids
        whole = notes[ARIA.events(notes)[0]].tolist()
        for view in range(2):
            row, end = tokens[piece, view], eos[piece, view]
            assert_slice(row, end)
            cut = row[ARIA.events(row)[0]].tolist()
            starts = range(len(whole) - len(cut) + 1)
            assert any(whole[i : i + len(cut)] == cut for i in starts)
    assert any(not np.array_equal(a, b) for a, b in tokens[:n])


def test_augmented_pairs_stay_whole_slices(corpus):
    for batch in take(pairs(corpus, seq_len=1024), 10):
        for tokens, eos in zip(batch["tokens"], batch["eos"], strict=True):
            for view in range(2):
                assert_slice(tokens[view], eos[view])
                body = tokens[view][: eos[view]]
                # No note lost its duration to a slower tempo.
                assert ARIA.tokens[body[-1]][0] == "dur"


def test_long_slices_are_cut_and_still_end(corpus):
    batch = take(pairs(corpus, seq_len=40), 1)[0]
    assert (batch["eos"] == 39).any()
    for tokens, eos in zip(batch["tokens"].reshape(-1, 40), batch["eos"].ravel(), strict=True):
        assert tokens[eos] == ARIA.eos_id


def test_composers_are_grouped_as_hard_negatives(corpus, tmp_path):
    # Composers stand in for compositions, so that the batch tells whose piece a row is.
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    with np.load(folder / index_name("train")) as index:
        columns = dict(index)
    for kind in ("label", "values"):
        columns[f"{kind}:composition"] = columns[f"{kind}:composer"]
    np.savez(folder / index_name("train"), **columns)
    composers = columns["label:composer"]

    loader = pairs(folder, composer_group=4, epochs=1, global_batch=1)
    order = joined(list(loader.iterate()), "composition")
    assert sorted(order.tolist()) == sorted(composers.tolist())
    # 8, 8 and 7 pieces of three composers in groups of up to 4: at most one change a group.
    assert np.count_nonzero(np.diff(order)) <= 5
    mixed = joined(list(pairs(folder, epochs=1, global_batch=1).iterate()), "composition")
    assert np.count_nonzero(np.diff(mixed)) > 5


def test_consecutive_slices_follow_each_other(corpus):
    shards = TokenShards(corpus, "train")
    options = {"consecutive": True, "augment": None, "shuffle": False, "epochs": 1}
    batches = list(pairs(corpus, seq_len=1024, **options).iterate())
    for piece, views in enumerate(joined(batches, "tokens")[: len(shards)]):
        whole = shards[piece].ids[ARIA.events(shards[piece].ids)[0]].tolist()
        both = [ids[ARIA.events(ids)[0]].tolist() for ids in views]
        cut = both[0] + both[1]
        assert any(whole[i : i + len(cut)] == cut for i in range(len(whole)))


def test_labelled_slices_carry_their_class_and_cover_every_note(corpus):
    assert label_values(corpus, "composer") == COMPOSERS
    shards = TokenShards(corpus, "val")
    codes, values = shards.label_codes("composer")
    options = {"split": "val", "shuffle": False, "epochs": 1, "seq_len": 1024}
    batches = list(labelled(corpus, slice_notes=50, **options).iterate())
    piece, label = joined(batches, "piece"), joined(batches, "label")
    n_tokens, eos = joined(batches, "n_tokens"), joined(batches, "eos")
    tokens, real = joined(batches, "tokens"), joined(batches, "piece") >= 0
    np.testing.assert_array_equal(n_tokens[real], eos[real] + 1)
    assert (n_tokens[~real] == 0).all() and (tokens[~real] == ARIA.pad_id).all()
    n_notes = np.zeros(len(shards), int)
    for row in np.flatnonzero(real):
        assert_slice(tokens[row], eos[row])
        assert COMPOSERS[label[row]] == values[codes[piece[row]]]
        n_notes[piece[row]] += ARIA.n_notes(tokens[row])
    np.testing.assert_array_equal(n_notes, shards.n_notes)


def test_labels_do_not_leak_into_slices(corpus):
    batch = take(labelled(corpus), 1)[0]
    composers = [ARIA.id_of(("prefix", "composer", name)) for name in COMPOSERS]
    assert np.isin(corpus_stream(corpus), composers).any()
    assert not np.isin(batch["tokens"], composers).any()


# --- streams ---


@pytest.mark.parametrize("name", LOADERS)
def test_resuming_anywhere_equals_running_straight(corpus, name):
    straight = take(LOADERS[name](corpus), 14)
    for step in (3, 7):
        assert_same(take(LOADERS[name](corpus), 14 - step, step), straight[step:])
    other = take(LOADERS[name](corpus, seed=1), 1)
    key = next(iter(other[0]))
    assert not np.array_equal(other[0][key], straight[0][key])


@pytest.mark.parametrize("name", LOADERS)
def test_hosts_share_each_global_batch(corpus, name):
    whole = take(LOADERS[name](corpus), 8)
    for count in (2, 4):
        hosts = [
            take(LOADERS[name](corpus, shard_index=host, shard_count=count), 8)
            for host in range(count)
        ]
        joined_batches = [
            {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            for parts in zip(*hosts, strict=True)
        ]
        assert_same(joined_batches, whole)


def test_two_hosts_see_each_piece_once_an_epoch(corpus):
    options = {"epochs": 1, "shard_count": 2, "slice_notes": 50}
    seen = [
        joined(list(labelled(corpus, shard_index=host, **options).iterate()), "piece")
        for host in range(2)
    ]
    real = np.concatenate(seen)
    assert sorted(real[real >= 0].tolist()) == list(range(len(TokenShards(corpus, "train"))))


@pytest.mark.parametrize("name", ["concat", "pairs"])
def test_worker_processes_deliver_the_same_batches(corpus, name):
    batches = LOADERS[name](corpus, workers=2).iterate(2)
    try:
        got = [next(batches) for _ in range(5)]
    finally:
        batches.close()
    assert_same(got, take(LOADERS[name](corpus), 5, 2))


def test_sizes_are_known_beforehand(corpus):
    loader = windows(corpus, shard_count=2, epochs=1)
    n = -(-(len(corpus_stream(corpus)) - 1) // 128)
    assert (loader.batch_size, loader.global_batch) == (2, 4)
    assert loader.steps_per_epoch == loader.n_steps == -(-n // 4)
    assert len(list(loader.iterate())) == loader.n_steps
    assert not list(loader.iterate(loader.n_steps))


def test_grain_comes_without_jax(corpus):
    program = (
        "import sys; from data_pipeline.loaders import lm_windows\n"
        f"loader = lm_windows({str(corpus)!r}, split='train', seq_len=64, global_batch=2, "
        "seed=0)\nnext(loader.iterate())\nprint('grain' in sys.modules, 'jax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.stdout.split() == ["True", "False"], out.stderr


def test_misuse_is_explained(corpus):
    for message, make in {
        "packing='tight'": lambda: windows(corpus, packing="tight"),
        "multiple of the number of hosts": lambda: windows(corpus, shard_count=3),
        "host 2 of 2": lambda: windows(corpus, shard_index=2, shard_count=2),
        "min_slice_notes=90": lambda: pairs(corpus, min_slice_notes=90),
        "no piece of split": lambda: labelled(corpus, class_names=("ravel",)),
        "no piece has a label 'mood'": lambda: label_values(corpus, "mood"),
        "must not be negative": lambda: take(windows(corpus), 1, -1),
    }.items():
        with pytest.raises(UserError, match=message):
            make()
