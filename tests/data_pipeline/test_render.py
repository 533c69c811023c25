"""Scores before their performances: pairs, windows, loss mask, and how near a rendering is."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aria_jax.generate.grammar import grammar_after
from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.loaders.scores import score_windows
from data_pipeline.midi import NOTE, Performance
from data_pipeline.settings import AugmentConfig
from data_pipeline.shards import TokenShards, load_manifest, rejections
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.tokenizers.render import pair_bytes, rendition_errors

TOKENIZER = Tokenizer.preset("render")


def pairs(seed: int, n: int = 60) -> dict[str, list]:
    """A score of chords and single notes, and a performance whose velocity follows the pitch."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.choice([0, 0.5, 1], n))
    pitch = rng.integers(40, 80, n)
    _, first = np.unique(
        np.stack([onset, pitch]), axis=1, return_index=True
    )  # no key twice at once
    onset, pitch = onset[np.sort(first)], pitch[np.sort(first)]
    played = onset * 400 + rng.integers(0, 40, len(onset))
    return {
        "score_onset": onset.tolist(), "score_end": (onset + 0.5).tolist(), "pitch": pitch.tolist(),
        "onset_ms": played.astype(int).tolist(), "end_ms": (played + 200).astype(int).tolist(),
        "velocity": (10 * (pitch // 8)).tolist(),
    }  # fmt: skip


def ids_of(row: dict[str, list]) -> np.ndarray:
    return TOKENIZER.encode(TOKENIZER.read(pair_bytes(row)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of eight pieces, two of each composition."""
    folder = tmp_path_factory.mktemp("render")
    rows = [
        {"path": f"{i}.mid", "composition": f"work {i // 2}", "composer": "bach", "n_deleted": 0}
        | pairs(i)
        for i in range(8)
    ]
    rows.append({**rows[0], "path": "bad.mid", "pitch": [*rows[0]["pitch"][1:], 128]})
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    build(folder / "pairs.parquet", folder / "corpus", tokenizer_preset="render", filters="none",
          workers=1, val_fraction=0.3)  # fmt: skip
    return folder / "corpus"


def test_every_note_of_the_score_is_found_in_the_performance():
    for seed in range(20):
        row = pairs(seed)
        ids = ids_of(row)
        score, performance = TOKENIZER.halves(ids)
        which = TOKENIZER.performed(ids)
        assert sorted(which) == list(range(len(row["pitch"])))
        pitches = [
            TOKENIZER.pitch[half[TOKENIZER.kind[half] == TOKENIZER.kind[TOKENIZER.first_note_id]]]
            for half in (score, performance)
        ]
        assert (pitches[0] == pitches[1][which]).all()


def test_a_slice_has_the_same_notes_in_score_and_performance_from_zero():
    ids = ids_of(pairs(3))
    part = TOKENIZER.slice_ids(ids, TOKENIZER.note_positions(ids), 20, 40)
    assert TOKENIZER.n_notes(part) == 20
    assert (np.sort(TOKENIZER.performed(part)) == np.arange(20)).all()
    whole, played = TOKENIZER.decode(ids).notes, TOKENIZER.decode(part).notes
    assert len(played) == 20 and played["start"].min() == 0
    chosen = np.sort(TOKENIZER.performed(ids)[20:40])
    expected = whole[chosen]
    assert (played["pitch"] == expected["pitch"]).all()
    assert (played["start"] == expected["start"] - expected["start"].min()).all()
    assert (played["velocity"] == expected["velocity"]).all()


def test_a_score_file_becomes_what_stands_before_a_performance():
    notes = np.zeros(3, NOTE)
    notes["start"], notes["end"], notes["pitch"] = [0, 240, 480], [240, 480, 960], [60, 62, 64]
    notes["velocity"] = [10, 90, 50]
    ids = TOKENIZER.encode(
        Performance(240, notes, tempi=Performance(1, notes).tempi), add_eos=False
    )
    score, behind = TOKENIZER.halves(ids)
    tokens = [TOKENIZER.tokens[i] for i in score]
    assert [t[1] for t in tokens if t[0] == "onset"] == [0, 500, 1000]
    assert [t for t in tokens if t[0] == "piano"] == [("piano", p, 60) for p in (60, 62, 64)]
    assert [TOKENIZER.tokens[i] for i in behind] == [("prefix", "instrument", "piano"), "<S>"]
    _, state = grammar_after(TOKENIZER, ids, 1)
    assert int(state.onset_B[0]) == 0 and not bool(state.dim_seen_B[0])  # the score's time is over
    assert len(TOKENIZER.decode(ids).notes) == 0


def test_vocabulary_and_hash_are_those_of_aria():
    assert TOKENIZER.hash == Tokenizer.preset("aria").hash and TOKENIZER.scheme == "render"


def test_shards_hold_pairs_and_bad_ones_are_named(corpus):
    manifest = load_manifest(corpus)
    assert manifest["tokenizer"]["preset"] == "render" and manifest["n_accepted"] == 8
    (bad,) = rejections(corpus)
    assert bad["path"] == "bad.mid" and "a pitch outside 0..127" in bad["value"]
    record = TokenShards(corpus, "train")[0]
    assert record.meta["n_notes"] == TOKENIZER.n_notes(record.ids)
    assert set(record.meta["labels"]) == {"composer", "composition"}


def test_only_the_performance_has_a_loss(corpus):
    stream = score_windows(
        corpus, split="train", seq_len=256, global_batch=6, seed=0, min_slice_notes=8,
        max_slice_notes=16,
    )  # fmt: skip
    batch = stream[0]
    for inputs, targets, mask in zip(
        batch["inputs"], batch["targets"], batch["loss_mask"], strict=True
    ):
        begins = np.flatnonzero(inputs == TOKENIZER.bos_id)[1]
        assert not mask[:begins].any()
        learnt = targets[mask]
        assert (targets[begins : begins + mask.sum()] == learnt).all()
        assert learnt[-1] == TOKENIZER.eos_id and (learnt == TOKENIZER.eos_id).sum() == 1
        n = (TOKENIZER.kind[learnt] == TOKENIZER.kind[TOKENIZER.first_note_id]).sum()
        assert 8 <= n <= 16
    assert (stream[3]["inputs"] == stream[3]["inputs"]).all()
    rows = stream.rows(1, (2, 4))
    assert (rows["targets"] == stream[1]["targets"][2:4]).all()


def test_without_shuffling_all_of_a_piece_comes_once(corpus):
    stream = score_windows(
        corpus, split="val", seq_len=256, global_batch=3, seed=0, min_slice_notes=8,
        max_slice_notes=16, shuffle=False, epochs=1,
    )  # fmt: skip
    kind = TOKENIZER.kind[TOKENIZER.first_note_id]
    n = sum(
        int((TOKENIZER.kind[b["targets"][b["loss_mask"]]] == kind).sum())
        for b in (stream[i] for i in range(len(stream)))
    )
    assert n == TokenShards(corpus, "val").n_notes.sum()


def test_score_and_performance_are_transposed_alike():
    ids = ids_of(pairs(5))
    config = AugmentConfig(pitch=4)
    moved = [TOKENIZER.augment(ids, config, np.random.default_rng(seed)) for seed in range(8)]
    kind = TOKENIZER.kind[TOKENIZER.first_note_id]
    note = TOKENIZER.kind[ids] == kind
    steps = {
        tuple(np.unique(TOKENIZER.pitch[one[note]] - TOKENIZER.pitch[ids[note]])) for one in moved
    }
    assert len(steps) > 2 and all(len(step) == 1 for step in steps)
    assert all((TOKENIZER.velocity[one] == TOKENIZER.velocity[ids]).all() for one in moved)


def test_errors_of_a_rendering_are_what_was_changed():
    row = pairs(7)
    truth = ids_of(row)
    same = rendition_errors(TOKENIZER, truth, truth)
    assert same["matched"] == 1 and same["added"] == 0 and same["onset_ms"] == 0
    assert same["velocity_r"] == pytest.approx(1)
    slower = {
        **row,
        "onset_ms": [2 * t for t in row["onset_ms"]],
        "end_ms": [2 * t for t in row["end_ms"]],
    }
    found = rendition_errors(TOKENIZER, truth, ids_of(slower))
    played = np.array(row["onset_ms"]) - min(row["onset_ms"])
    assert found["onset_ms"] == pytest.approx(played.mean(), rel=0.02)
    assert found["onset_ms_scaled"] < 10  # steps of the tokens
    quiet = {**row, "velocity": [120 - v for v in row["velocity"]]}
    assert rendition_errors(TOKENIZER, truth, ids_of(quiet))["velocity_r"] == pytest.approx(
        -1, abs=0.02
    )
    score, performance = TOKENIZER.halves(truth)
    shorter = np.concatenate([score, performance[: len(performance) // 2]])
    found = rendition_errors(TOKENIZER, truth, shorter)
    assert 0.4 < found["matched"] < 0.6 and found["added"] == 0
    assert np.isnan(rendition_errors(TOKENIZER, truth, score)["onset_ms"])


def test_render_and_other_data_are_told_apart(corpus, midi_corpus, tmp_path):
    with pytest.raises(
        UserError, match="scores with performances are here; add --tokenizer render"
    ):
        build(corpus.parent / "pairs.parquet", tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="--tokenizer render takes a Parquet file"):
        build(midi_corpus, tmp_path / "out", tokenizer_preset="render", workers=1)
