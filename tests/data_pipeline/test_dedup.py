"""Copies are found whatever was done to them; other performances are not taken for copies."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline import dedup
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, PEDAL, PROGRAM, TEMPO, Performance, read_midi
from data_pipeline.tokenizers import Tokenizer


def performance(seed, n_notes=300):
    """Melody and chords with the small irregularities of a human player."""
    rng = np.random.default_rng(seed)
    notes = np.zeros(n_notes, NOTE)
    notes["start"] = np.cumsum(
        rng.choice([3, 7, 120, 240, 480], n_notes) + rng.integers(0, 40, n_notes)
    )
    notes["end"] = notes["start"] + rng.integers(50, 900, n_notes)
    notes["pitch"] = np.clip(60 + np.cumsum(rng.integers(-6, 7, n_notes)), 25, 95)
    notes["velocity"] = rng.integers(20, 110, n_notes)
    return Performance(500, notes)


def stretched(original, factor, ticks_per_beat=480, tempo=500_000):
    """Re-exported with other ticks, all times multiplied by `factor`."""
    notes = original.notes.copy()
    for name in ("start", "end"):
        ms = original.ms(original.notes[name]) * factor
        notes[name] = np.round(ms * 1000 / tempo * ticks_per_beat)
    notes = notes[np.argsort(notes["start"], kind="stable")]
    return Performance(ticks_per_beat, notes, tempi=np.array([(0, tempo)], TEMPO))


def transposed(original, semitones):
    notes = original.notes.copy()
    notes["pitch"] = np.clip(notes["pitch"].astype(int) + semitones, 0, 127)
    return replace(original, notes=notes)


def trimmed(original, start, stop):
    n = len(original.notes)
    return replace(original, notes=original.notes[int(n * start) : int(n * stop)])


def tokenised(original):
    tokenizer = Tokenizer.preset("aria")
    return tokenizer.decode(tokenizer.encode(original))


COPIES = {
    "transposed": lambda p: transposed(p, -4),
    "stretched": lambda p: stretched(p, 1.17),
    "re-exported": lambda p: stretched(p, 1.0, ticks_per_beat=384, tempo=410_000),
    "trimmed": lambda p: trimmed(p, 0.1, 0.8),
    "tokenised": tokenised,
    "all at once": lambda p: tokenised(transposed(stretched(trimmed(p, 0, 0.85), 0.9), 2)),
}


def fingerprints(performances):
    return np.stack([dedup.fingerprint(p) for p in performances])


def find_copies(originals, copies):
    """(share of copies found, originals lost because they pass for copies of others)."""
    everything = [*originals, *copies]
    hashes = [dedup.content_hash(p) for p in everything]
    found = dedup.near_duplicates(
        fingerprints(everything), [len(p.notes) for p in everything], hashes
    )
    n = len(originals)
    return np.mean(found[n:] == found[:n]), n - np.unique(found[:n]).size


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_are_found(kind):
    originals = [performance(seed) for seed in range(30)]
    recall, confused = find_copies(originals, [COPIES[kind](p) for p in originals])
    assert recall >= 0.95 and confused == 0


def test_real_copies_are_found_and_other_performers_are_not(real_midi):
    """75 performances of 15 movements, five each: the hardest thing not to confuse."""
    rows = json.loads((real_midi / "asap" / "metadata.json").read_text())
    by_title = {}
    for row in rows:
        by_title.setdefault(row["title"], []).append(row["path"])
    chosen = [paths[:5] for _, paths in sorted(by_title.items()) if len(paths) >= 5][::5][:15]
    originals = [read_midi(real_midi / path) for paths in chosen for path in paths]
    assert len(originals) >= 50
    for kind, minimum in (("stretched", 1.0), ("all at once", 0.95)):
        recall, confused = find_copies(originals, [COPIES[kind](p) for p in originals])
        assert recall >= minimum and confused == 0, (kind, recall)


def test_a_fingerprint_is_the_least_value_of_each_hash_function():
    from data_pipeline._kernels import min_hashes

    rng = np.random.default_rng(0)
    shingles, factors, offsets = (rng.integers(0, 2**64, n, np.uint64) for n in (300, 96, 96))
    every = (shingles[:, None] * factors + offsets) >> np.uint64(32)
    assert min_hashes(shingles, factors, offsets).tolist() == every.min(axis=0).tolist()


def test_grouping_does_not_depend_on_the_order_of_files():
    performances = [performance(seed) for seed in range(8)]
    performances += [trimmed(p, 0, 0.7) for p in performances[:4]]
    names = np.array([dedup.content_hash(p) for p in performances])
    expected = None
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(performances))
        shuffled = [performances[i] for i in order]
        kept = dedup.near_duplicates(
            fingerprints(shuffled), [len(p.notes) for p in shuffled], names[order]
        )
        result = dict(zip(names[order], names[order][kept], strict=True))
        expected = expected or result
        assert result == expected
    for i in range(4):  # the longer one stays
        assert expected[names[8 + i]] == names[i]
    assert sum(name == kept for name, kept in expected.items()) == 8


def test_short_pieces_are_only_compared_exactly():
    short = [performance(seed, n_notes=20) for seed in (0, 0, 1)]
    hashes = [dedup.content_hash(p) for p in short]
    assert dedup.near_duplicates(fingerprints(short), [20] * 3, hashes).tolist() == [0, 0, 2]
    empty = dedup.near_duplicates(np.zeros((0, dedup.N_HASHES), np.uint32), [], [])
    assert empty.shape == (0,)


def test_content_hash_sees_what_is_played_and_nothing_else():
    original = performance(0)
    pedals = np.array([(100, 127, 0), (900, 0, 0)], PEDAL)
    original = replace(original, pedals=pedals)
    same = [
        replace(original, texts=("a title",)),
        replace(original, ticks_per_beat=1000, tempi=np.array([(0, 1_000_000)], TEMPO)),
        replace(original, programs=np.array([(0, 0, 3)], PROGRAM)),
        replace(original, pedals=np.array([(100, 90, 0), (150, 127, 0), (900, 3, 0)], PEDAL)),
    ]
    moved = original.notes.copy()
    moved["channel"] = 5
    moved_pedals = pedals.copy()
    moved_pedals["channel"] = 5
    same.append(replace(original, notes=moved, pedals=moved_pedals))
    late = original.notes.copy()
    late["start"] += 700
    late["end"] += 700
    late_pedals = pedals.copy()
    late_pedals["tick"] += 700
    same.append(replace(original, notes=late, pedals=late_pedals))
    assert {dedup.content_hash(p) for p in same} == {dedup.content_hash(original)}

    def changed(name, index, by):
        notes = original.notes.copy()
        notes[name][index] += by
        return replace(original, notes=notes)

    different = [
        changed("velocity", 3, 1), changed("pitch", 3, 1), changed("end", 3, 1),
        replace(original, notes=original.notes[:-1]),
        replace(original, pedals=original.pedals[:1]),
        replace(original, programs=np.array([(0, 48, 0)], PROGRAM)),
    ]  # fmt: skip
    hashes = {dedup.content_hash(p) for p in [original, *different]}
    assert len(hashes) == 1 + len(different)


def test_content_hash_hears_the_program_in_force():
    """One channel that changes to strings sounds as two channels do, one of them the strings."""
    notes = performance(0).notes
    middle = int(notes["start"][len(notes) // 2])
    changing = np.array([(0, 0, 0), (middle, 40, 0)], PROGRAM)
    one = Performance(500, notes, programs=changing)
    apart = notes.copy()
    apart["channel"][notes["start"] >= middle] = 1
    two = Performance(500, apart, programs=np.array([(0, 0, 0), (0, 40, 1)], PROGRAM))
    assert dedup.content_hash(one) == dedup.content_hash(two)
    assert dedup.content_hash(one) != dedup.content_hash(replace(one, programs=changing[:1]))
    assert dedup.content_hash(one) != dedup.content_hash(replace(one, compat="aria-utils"))


def test_cap_keeps_the_same_pieces_in_any_order():
    groups = np.array([0] * 6 + [7] * 2 + [-1] * 4)
    hashes = np.array([f"{(7 * i) % 12:02d}" for i in range(12)])
    keep = dedup.cap_per_group(groups, hashes, 3)
    assert keep[:6].sum() == 3 and keep[6:].all()
    assert sorted(hashes[:6])[:3] == sorted(hashes[:6][keep[:6]])
    order = np.random.default_rng(0).permutation(12)
    again = dedup.cap_per_group(groups[order], hashes[order], 3)
    assert again.tolist() == keep[order].tolist()


def test_impossible_limits_are_explained():
    with pytest.raises(UserError, match="max_per_group=0"):
        dedup.cap_per_group(np.zeros(1, int), np.array(["x"]), 0)
    with pytest.raises(UserError, match="min_similarity=0"):
        dedup.near_duplicates(
            np.zeros((1, dedup.N_HASHES), np.uint32), [1], ["x"], min_similarity=0
        )
