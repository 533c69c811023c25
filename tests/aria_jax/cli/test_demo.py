"""The demo's stages on self-made pieces: it ends with a report, goes on where it was stopped."""

import json

import jax
import numpy as np
import pytest

from aria_jax.cli import demo
from aria_jax.cli.main import main
from aria_jax.report.demo import _verdict
from data_pipeline.midi import NOTE, Performance, write_midi


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """24 pieces by two made-up composers: one plays low and slow, the other high and fast."""
    folder, rng, rows = tmp_path_factory.mktemp("pieces"), np.random.default_rng(0), []
    for i in range(24):
        fast = i % 2
        notes = np.zeros(120, NOTE)
        notes["start"] = np.cumsum(rng.integers(80, 200, 120) * (1 if fast else 3))
        notes["end"] = notes["start"] + 150
        notes["pitch"] = rng.integers(70, 90, 120) if fast else rng.integers(40, 60, 120)
        notes["velocity"] = 70
        write_midi(Performance(500, notes), folder / f"{i}.mid")
        composer = "presto" if fast else "lento"
        rows.append({"path": f"{i}.mid", "composer": composer, "composition": f"work {i}"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def quick(monkeypatch):
    devices = jax.devices()
    for name in ("devices", "local_devices"):  # compiling for eight takes longer
        monkeypatch.setattr(jax, name, lambda *_, **__: devices[:1])
    monkeypatch.setattr(
        demo, "PRETRAIN", "steps=2 d_model=16 n_heads=2 n_layers=1 seq_len=64 global_batch=8"
    )
    monkeypatch.setattr(
        demo, "CONTRASTIVE",
        "steps=2 d_model=16 n_heads=2 n_layers=1 emb_size=16 seq_len=128 global_batch=8 "
        "min_slice_notes=20 max_slice_notes=30",
    )  # fmt: skip
    monkeypatch.setattr(demo, "UNTRAINED", demo.CONTRASTIVE.replace("steps=2", "steps=0", 1))
    monkeypatch.setattr(demo, "GENERATE", "--seconds 2 --n 1 --max-tokens 32")


def test_ends_with_a_report_and_repeats_nothing(pieces, quick, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", str(out), "--midi", str(pieces), "--workers", "1"]) == 0
    page = (out / "report.html").read_text()
    probe = json.loads((out / "steps" / "probe-contrastive.json").read_text())["result"]
    assert f"{probe['accuracy']:.3f}" in page and f"{probe['macro_f1']:.3f}" in page
    assert page.count("<svg") >= 6 and "aria-jax train contrastive" in page
    assert list((out / "continuation").glob("*.mid"))
    assert list((out / "continuation-released").glob("*.mid"))
    assert page.count(">listen<") == 2 and "mini-embedding, which comes with" in page
    capsys.readouterr()
    assert main(["demo", str(out), "--midi", str(pieces), "--workers", "1"]) == 0
    assert "already made of the same: nothing to do" in capsys.readouterr().err
    for lost in (out / "report.html", out / "steps" / "generate.json"):
        lost.unlink()
    assert main(["demo", str(out), "--midi", str(pieces), "--workers", "1"]) == 0
    shown = capsys.readouterr().err
    n_steps = len(demo.steps_before_generation(out, str(pieces), 1))
    assert shown.count("done before") == n_steps + 1 and "aria-jax generate" in shown


def test_a_stopped_step_tells_how_to_go_on(pieces, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aria_jax.train.loop.StepMonitor.flush", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["demo", str(tmp_path / "out"), "--midi", str(pieces), "--workers", "1"])
    assert (tmp_path / "out" / "steps" / "build.json").exists()
    assert not (tmp_path / "out" / "steps" / "pretrain.json").exists()


def test_a_file_in_the_way_is_explained(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(["demo", str(tmp_path / "out")]) == 2
    assert "is a file" in capsys.readouterr().err


def scored(accuracy: float, low: float, high: float) -> dict:
    return {"accuracy": accuracy, "accuracy_ci": (low, high), "n_test": 81}


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        (scored(0.60, 0.5, 0.7), "does not beat"),
        (scored(0.74, 0.7, 0.8), "does not beat"),  # equal is not better
        (scored(0.78, 0.7, 0.8), "81 files do not settle it"),
        (scored(0.90, 0.86, 0.95), "beats the untrained network"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(tuned, says):
    assert says in _verdict(tuned, untrained=scored(0.74, 0.64, 0.84))
