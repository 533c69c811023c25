"""`aria-jax train` as a user sees it."""

import json
import struct
import subprocess
import sys

import jax
import pytest
import yaml

from aria_jax.cli.main import main
from aria_jax.config import SETTINGS

SMALL = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=32", "global_batch=8"]


def train(corpus, workdir, *arguments):
    return main(["train", "pretrain", "--data", str(corpus), "--workdir", str(workdir), *SMALL,
                 *arguments])  # fmt: skip


@pytest.fixture
def one_device(monkeypatch):
    """For runs that are about something else: compiling for eight takes longer."""
    devices = jax.devices()
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: devices[:1])


def test_trains_and_goes_on(one_device, corpus, tmp_path, capsys):
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
    for word in ("parameters", "tokens per step", "GiB per device", "epochs", "data 8 × fsdp 1"):
        assert word in text
    assert "s a step, measured here just now\n" in text
    assert not workdir.exists()


def test_a_dry_run_times_few_rows_of_a_large_step(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aria_jax.train.loop.TIMED_FLOPS", 1.0)
    assert (
        train(corpus, tmp_path / "w", "--dry-run", "global_batch=64", "steps=3600", "--json") == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["hours"] == pytest.approx(plan["step_seconds"]) and plan["step_seconds"] > 0
    assert train(corpus, tmp_path / "w", "--dry-run", "global_batch=64") == 0
    assert "measured here just now on 16 of its rows" in capsys.readouterr().out


def test_a_dry_run_does_not_try_what_does_not_fit_here(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert train(corpus, tmp_path / "w", "--dry-run") == 0
    assert "unknown: this machine's 0 GiB do not hold a step" in capsys.readouterr().out


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


def test_a_run_writes_its_settings_and_takes_them_back(one_device, corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "a", "steps=1", "peak_lr=3e-3", "eval_batches=1") == 0
    written = tmp_path / "a" / "config.yaml"
    values = yaml.safe_load(written.read_text())
    assert values["train"]["steps"] == 1 and values["optimizer"]["peak_lr"] == 3e-3
    again = ["train", "pretrain", "--data", str(corpus), "--workdir", str(tmp_path / "b")]
    assert main([*again, "--config", str(written)]) == 0
    losses = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for run in "ab"
    ]
    assert losses[0] == losses[1]
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text()) == values


def test_a_bad_beginning_is_found_before_jax_is_imported(corpus, tmp_path):
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    (tmp_path / "empty.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    code = (
        "import sys\nfrom aria_jax.cli.main import main\n"
        "task = ['train', 'pretrain', '--data', sys.argv[1], '--workdir', sys.argv[2]]\n"
        "for path in sys.argv[3:]:\n"
        "    for options in ([], ['--dry-run']):\n"
        "        assert main([*task, *options, '--init-from', path]) == 2, path\n"
        "sys.exit('jax' in sys.modules)"
    )
    bad = ("killed", "page.safetensors", "empty.safetensors", "nothing")
    paths = [str(tmp_path / name) for name in ("run", *bad)]
    command = [sys.executable, "-c", code, str(corpus), *paths]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    expected = ("no complete checkpoint", "not a readable", "holds no weights", "neither a")
    assert len(lines) == 8 and not (tmp_path / "run").exists()
    for at, (name, message) in enumerate(zip(bad, expected, strict=True)):
        assert all(name in line and message in line for line in lines[2 * at : 2 * at + 2])


def test_the_command_line_goes_before_the_file(corpus, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("steps: 123\nlog_every: 7\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--dry-run", "steps=77"]
    assert train(corpus, tmp_path / "run", *arguments) == 0
    assert "77 steps" in capsys.readouterr().out


def test_all_settings_are_listed_without_a_run(capsys):
    assert main(["train", "--settings"]) == 0
    text = capsys.readouterr().out
    for name, setting in SETTINGS.items():
        assert f"  {name.partition('.')[2]}=" in text and setting.type_name in text
    assert main(["train", "contrastive", "--settings", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows.keys() == SETTINGS.keys() and all(row["doc"] for row in rows.values())
    assert rows["model.head"]["preset"] == "embedding" and rows["model.head"]["default"] == "lm"
