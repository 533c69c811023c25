"""Trackers of other services, offline: what they keep, and a run that goes on in one it began."""

import json
import time

import pytest

from aria_jax.cli.main import main
from aria_jax.presets import for_task
from aria_jax.train import trackers
from aria_jax.train.trackers import Forgiving, check_trackers, open_sinks
from data_pipeline.errors import UserError


def settings(*names):
    from aria_jax.config import with_overrides

    return with_overrides(for_task("tiny", "pretrain"), [f"trackers={','.join(names)}"])


def write(workdir, name, *rows):
    """What a start of a run writes: (step, loss, split) each."""
    (sink,) = open_sinks(settings(name), workdir)
    for step, loss, split in rows:
        sink.write(step, {"loss": loss, "n_tokens/it's": 3.0}, split)
    sink.close()


def test_the_setting_chooses_and_names_each_once(tmp_path):
    sinks = open_sinks(settings("tensorboard", "jsonl", "jsonl"), tmp_path)
    assert {type(sink).__name__ for sink in sinks} == {"JsonlSink", "TensorBoardSink"}
    assert len(sinks) == 2 and not list(tmp_path.iterdir())  # nothing before the first metrics
    assert open_sinks(settings(), tmp_path) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_any_work(name, monkeypatch, tmp_path, corpus, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    run = ["train", "pretrain", "--data", str(corpus), "--workdir", str(tmp_path / "run")]
    assert main([*run, f"trackers=jsonl,{name}"]) == 2
    assert f"pip install 'aria-jax[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    check_trackers(("jsonl", "tensorboard"))


@pytest.fixture
def wandb(monkeypatch):
    found = pytest.importorskip("wandb", reason="needs wandb: pip install 'aria-jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return found


def wandb_history(folder):
    """(step, name, value) of all that an offline folder of W&B holds: LevelDB's log format.

    Its service may still be writing when a run is finished.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    found, last, deadline = [], "", time.monotonic() + 10
    while last != "exit" and time.monotonic() < deadline:
        content, at, found = file.read_bytes(), 7, []
        assert content.startswith(b":W&B") and len(content) < 32_768  # one block: none is split
        while at < len(content):
            size = int.from_bytes(content[at + 4 : at + 6], "little")
            if at + 7 + size > len(content):
                break
            record = wandb_internal_pb2.Record.FromString(content[at + 7 : at + 7 + size])
            last, at = record.WhichOneof("record_type"), at + 7 + size
            items = {"/".join(item.nested_key): item.value_json for item in record.history.item}
            found += [(int(items["step"]), k, float(v)) for k, v in items.items() if "/" in k]
    return found


def test_wandb_keeps_the_curves_offline_and_a_resumed_run_goes_on_in_them(wandb, tmp_path):
    write(tmp_path, "wandb", (1, 3.0, "train"), (2, 2.0, "train"), (2, 2.5, "val"))
    name = json.loads((tmp_path / trackers.NAMES).read_text())["wandb"]
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    found = wandb_history(first)
    assert {row for row in found if row[1].endswith("/loss")} == {
        (1, "train/loss", 3.0), (2, "train/loss", 2.0), (2, "val/loss", 2.5),
    }  # fmt: skip
    assert (1, "train/n_tokens/it's", 3.0) in found
    write(tmp_path, "wandb", (2, 1.9, "train"))
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [each.name.endswith(f"-{name}") for each in folders] == [True, True]
    assert (2, "train/loss", 1.9) in wandb_history(folders[1])


def test_wandb_names_a_missing_login(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")

    def nobody(**_):
        raise wandb.Error("no key")

    monkeypatch.setattr(wandb, "login", nobody)
    with pytest.raises(UserError, match=r"log in with `wandb login`.*WANDB_MODE=offline"):
        open_sinks(settings("wandb"), tmp_path)


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return pytest.importorskip("mlflow", reason="needs mlflow: pip install 'aria-jax[mlflow]'")


def test_mlflow_keeps_the_curves_in_files_and_a_resumed_run_goes_on_in_them(mlflow, tmp_path):
    write(tmp_path, "mlflow", (1, 3.0, "train"), (2, 2.0, "train"), (2, 2.5, "val"))
    write(tmp_path, "mlflow", (2, 1.9, "train"), (3, 1.0, "train"))
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert run.data.params["optimizer.b1"] == "0.9" and run.data.params["task"] == "pretrain"
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in curve] == [(1, 3.0), (2, 2.0), (2, 1.9), (3, 1.0)]
    assert [m.value for m in client.get_metric_history(run.info.run_id, "val/loss")] == [2.5]
    assert client.get_metric_history(run.info.run_id, "train/n_tokens/it_s")


def test_mlflow_begins_anew_where_its_run_is_gone(mlflow, tmp_path):
    trackers.remember(tmp_path, "mlflow", "0" * 32)
    write(tmp_path, "mlflow", (1, 3.0, "train"))
    assert trackers.known_as(tmp_path, "mlflow") != "0" * 32


def test_a_server_that_is_gone_ends_no_run(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="tracker mlflow failed and gets nothing more"):
        write(tmp_path, "mlflow", (1, 3.0, "train"), (2, 2.0, "train"))


class Failing:
    errors = (ConnectionError,)

    def __init__(self):
        self.asked = 0

    def write(self, *_):
        self.asked += 1
        raise ConnectionError("gone")

    def close(self):
        raise AssertionError("closed although it failed")


def test_a_tracker_that_fails_is_warned_of_once_and_a_fault_of_ours_is_not_hidden():
    sink = Forgiving("mlflow", failing := Failing())
    with pytest.warns(UserWarning, match=r"mlflow failed .*\(gone\)") as told:
        sink.write(1, {}, "train")
        sink.write(2, {}, "train")
        sink.close()
    assert failing.asked == 1 and len(told) == 1
    failing.errors = (ValueError,)
    with pytest.raises(ConnectionError):
        Forgiving("mlflow", failing).write(1, {}, "train")


def test_names_of_both_are_kept_side_by_side(tmp_path):
    assert trackers.known_as(tmp_path, "wandb") is None
    trackers.remember(tmp_path, "wandb", "a")
    trackers.remember(tmp_path, "mlflow", "b")
    assert [trackers.known_as(tmp_path, each) for each in ("wandb", "mlflow")] == ["a", "b"]
