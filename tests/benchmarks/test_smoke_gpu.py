"""Every section of the GPU's smoke test, tiny and on a CPU: on the day a GPU is there, a slip would
cost its time.
"""

import json
import threading

import pytest

from aria_jax.presets import CHIPS
from benchmarks import smoke_gpu

pytestmark = pytest.mark.slow
TINY = smoke_gpu.Sizes(
    pairs=40,
    rows=96,
    width=16,
    runs=(("tiny", ("global_batch=1", "seq_len=16", "d_model=32", "n_heads=2", "n_layers=1")),),
    steps=1,
    preset="tiny",
    tokens=4,
    sequences=1,
    files=2,
    notes=30,
    batches=(8, 16),
    max_naive=8,
)


@pytest.fixture(scope="module")
def found():
    return smoke_gpu.measure(smoke_gpu.sections(TINY, CHIPS["h100"], on_gpu=False))


def test_every_section_runs(found):
    assert found["failed"] == {} and found["left_out"] == []
    assert list(found["sections"]) == ["kernels", "pretrain tiny", "decode", "contrastive", "embed"]
    json.dumps(found)


def test_kernels_are_held_against_the_plain_computation(found):
    checks = found["sections"]["kernels"]
    assert set(checks) == {
        "contrastive float32", "contrastive bfloat16", "attention triton", "attention cudnn",
    }  # fmt: skip
    assert "skipped" in checks.pop("attention cudnn")
    assert all(0 < check["error"] <= check["tolerance"] for check in checks.values())
    assert smoke_gpu.succeeded(found)


def test_speeds_are_of_what_was_done(found):
    run = found["sections"]["pretrain tiny"]
    assert run["tokens_per_s"] * run["seconds"] == pytest.approx(16)
    assert 0 < run["mfu"] < 1 and run["bytes"] > 0
    estimated = run["estimated_over_measured"] * run["seconds"]
    assert 0 < run["estimated_seconds"] == pytest.approx(estimated)
    assert set(found["sections"]["contrastive"]) == {"aria_jax 8", "naive 8", "aria_jax 16"}
    ours, naive = (found["sections"]["contrastive"][f"{name} 8"] for name in ("aria_jax", "naive"))
    assert ours["loss"] == pytest.approx(naive["loss"], rel=1e-5)
    assert found["sections"]["embed"]["files_per_s"] > 0
    assert found["sections"]["decode"]["tokens_per_s_of_1"] > 0


def test_a_section_that_fails_or_is_too_late_does_not_stop_the_others(capsys):
    now = iter(range(0, 1000, 100))

    def broken():
        raise ValueError("no memory")

    todo = {"first": broken, "second": lambda: {"x": 1.0}, "third": dict}
    found = smoke_gpu.measure(todo, budget=450, clock=lambda: next(now))
    assert found["failed"] == {"first": "ValueError: no memory"}
    assert found["sections"] == {"second": {"x": 1.0}} and found["left_out"] == ["third"]
    assert not smoke_gpu.succeeded(found)
    assert "third: left out, 450 s are over" in capsys.readouterr().out


def test_a_section_that_does_not_end_is_reported_beside_what_was_found():
    told: list[dict] = []
    waits = threading.Event()

    def too_slow(found):
        told.append(json.loads(json.dumps(found)))
        waits.set()

    todo = {"first": lambda: {"x": 1.0}, "hangs": lambda: {"y": waits.wait(60)}, "third": dict}
    smoke_gpu.measure(todo, limit=0.5, too_slow=too_slow)
    assert told == [
        {
            "sections": {"first": {"x": 1.0}},
            "failed": {"hangs": "still running after 0 s"},
            "left_out": ["third"],
            "seconds": 0.5,
        }
    ]
    assert not smoke_gpu.succeeded(told[0])


def test_all_of_it_takes_less_than_five_minutes():
    assert smoke_gpu.BUDGET_SECONDS < smoke_gpu.LIMIT_SECONDS < 300


def test_a_wrong_kernel_fails():
    found = {"failed": {}, "sections": {"kernels": {"a": {"ok": True}, "b": {"ok": False}}}}
    assert not smoke_gpu.succeeded(found)


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert smoke_gpu.main(["--out", str(tmp_path / "out.json")]) == 0
    assert "skipped: no GPU that jax can use" in capsys.readouterr().out
    assert not (tmp_path / "out.json").exists()
