"""Scores to performances through the commands, on a player whose manner is simple."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aria_jax.cli.main import main
from benchmarks.eval_render import evaluate
from data_pipeline.midi import NOTE, Performance, read_midi, write_midi

LOUD_FROM = 60
"""Pitch from which this player plays with velocity 100 instead of 30."""


def row(seed: int, n: int = 200) -> dict:
    """A score in quavers, played 1.5 times as slow as the score's tokens say."""
    rng = np.random.default_rng(seed)
    pitch = rng.integers(48, 72, n)
    onset = np.arange(n) * 0.5
    return {
        "path": f"{seed}.mid", "composition": f"work {seed}",
        "score_onset": onset.tolist(), "score_end": (onset + 0.25).tolist(),
        "onset_ms": (onset * 750).tolist(), "end_ms": (onset * 750 + 100).tolist(),
        "pitch": pitch.tolist(),
        "velocity": np.where(pitch >= LOUD_FROM, 100, 30).tolist(),
    }  # fmt: skip


@pytest.mark.slow
def test_a_manner_of_playing_is_learnt_and_applied_to_another_score(tmp_path, capsys):
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(24)]), tmp_path / "pairs.parquet")
    data, run = tmp_path / "data", tmp_path / "run"
    build = ["data", "build", str(tmp_path / "pairs.parquet"), str(data), "--tokenizer", "render"]
    assert main([*build, "--filters", "none", "--val-fraction", "0.2"]) == 0
    train = ["train", "render", "--data", str(data), "--workdir", str(run), "--preset", "tiny"]
    settings = "d_model=64 n_heads=4 n_layers=2 vocabulary=corpus seq_len=112 global_batch=32"
    settings += " min_slice_notes=8 max_slice_notes=12 peak_lr=3e-3 warmup_steps=20 steps=400"
    assert main([*train, *settings.split(), "augmentation.pitch=0"]) == 0
    found = evaluate(str(data), str(run), 8, 8, 0.0)
    assert found["model"]["velocity_r"][0] > 0.9  # all that there is to be known of velocity
    assert found["model"]["matched"][0] > 0.9 and found["deadpan"]["matched"][0] == 1
    assert np.isnan(found["deadpan"]["velocity_r"][0])
    # Notes are 375 ms apart, 250 in the score: its onsets would be late by 125 ms more each note.
    copied = 125 * np.arange(8).mean()
    assert found["model"]["onset_ms"][0] < copied / 2
    notes = np.zeros(8, NOTE)
    notes["start"], notes["pitch"], notes["velocity"] = np.arange(8) * 240, np.arange(50, 66, 2), 64
    notes["end"] = notes["start"] + 120
    write_midi(Performance(480, notes), tmp_path / "score.mid")
    capsys.readouterr()
    out = tmp_path / "out"
    generate = ["generate", "--checkpoint", str(run), "--prompt", str(tmp_path / "score.mid")]
    generate += ["--notes", "8", "--max-tokens", "60", "--temperature", "0", "--out", str(out)]
    assert main([*generate, "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    played = read_midi(made["files"][0]["midi"])
    assert set(played.notes["pitch"]) <= set(range(48, 72)) and 6 <= len(played.notes) <= 10
    loud = played.notes["pitch"] >= LOUD_FROM
    assert played.notes["velocity"][loud].mean() > played.notes["velocity"][~loud].mean() + 40
