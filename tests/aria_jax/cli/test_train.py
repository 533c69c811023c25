"""`aria-jax train` as a user sees it."""

import json

import pytest

from aria_jax.cli.main import main

SMALL = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=32", "global_batch=8", "mesh.data=8"]


def train(corpus, workdir, *arguments):
    return main(["train", "pretrain", "--data", str(corpus), "--workdir", str(workdir), *SMALL,
                 *arguments])  # fmt: skip


def test_trains_and_goes_on(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path, "steps=2", "eval_every=2", "--json") == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["step"] == 2 and {"train/loss", "val/loss"} <= result["metrics"].keys()
    assert "starting from scratch" in shown.err and "2/2" in shown.err
    assert train(corpus, tmp_path, "steps=3") == 0
    shown = capsys.readouterr()
    assert "resuming" in shown.err and shown.out.startswith("step 3: train/loss")
    assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / "best").is_dir()


def test_a_dry_run_plans_and_writes_nothing(corpus, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(corpus, workdir, "--dry-run", "steps=100") == 0
    text = capsys.readouterr().out
    for word in ("parameters", "tokens a step", "GiB a device", "epochs", "data 8 × fsdp 1"):
        assert word in text
    assert not workdir.exists()


def test_a_dry_run_plans_for_machines_that_are_not_here(corpus, tmp_path, capsys):
    arguments = ["train", "pretrain", "--data", str(corpus), "--workdir", str(tmp_path / "w"),
                 "--preset", "medium", "--dry-run", "--json", "dtype=bfloat16"]  # fmt: skip
    sharded = [*arguments, "mesh.data=1", "mesh.fsdp=64", "remat=full", "--on", "v5p:64"]
    assert main(sharded) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["mesh"]["fsdp"] == 64 and plan["hours"] > 0
    assert main([*arguments, "remat=none", "--on", "v5e:1"]) == 1, "0.65B do not fit into 16 GiB"
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.parametrize("on", ["v5p", "v9:4", "v5p:none"])
def test_unknown_chips_are_a_user_error(on, corpus, tmp_path, capsys):
    assert train(corpus, tmp_path, "--dry-run", "--on", on) == 2
    assert "expected CHIP:COUNT" in capsys.readouterr().err
