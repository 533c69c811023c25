"""Settings in files: the same keys as the command line, and the same refusals."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.config import SETTINGS, RunConfig, with_overrides
from aria_jax.presets import for_task, with_config_file, write_config
from data_pipeline.errors import UserError


@pytest.mark.parametrize("task", ["pretrain", "continue", "contrastive"])
def test_what_a_run_writes_makes_the_same_run(task, tmp_path):
    run = with_overrides(
        for_task("tiny", task), ["peak_lr=1e-5", "lora_targets=qkv,out", "clip_norm=none"]
    )
    path = write_config(run, tmp_path)
    assert with_config_file(for_task("medium", task), path) == run
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(sorted(SETTINGS)), max_size=8), st.booleans(), st.booleans())
def test_flat_dotted_and_nested_keys_mean_the_same(tmp_path_factory, names, nested, as_json):
    preset = for_task("tiny", "contrastive")
    values: dict = {}
    for name in names:
        section, _, field = name.partition(".")
        value = getattr(getattr(preset, section), field)
        value = list(value) if isinstance(value, tuple) else value
        if nested:
            values.setdefault(section, {})[field] = value
        else:
            values[name] = value
    text = json.dumps(values) if as_json else yaml.safe_dump(values)
    path = tmp_path_factory.mktemp("settings") / f"run.{'json' if as_json else 'yml'}"
    path.write_text(text)
    changed = with_config_file(RunConfig(task="contrastive"), path)
    for name in names:
        section, _, field = name.partition(".")
        assert getattr(getattr(changed, section), field) == getattr(getattr(preset, section), field)


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("peak_lr: 1e-4\nsteps: 1e3\ndata.augment: false\nclip_norm: null\n")
    config = with_config_file(RunConfig(), path)
    assert config.optimizer.peak_lr == 1e-4 and config.train.steps == 1000
    assert config.data.augment is False and config.optimizer.clip_norm is None


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "stesp: 3", "nearest: steps"),
        ("a.yaml", "stesp: 3\nn_heads: 0\nlog_every: 1.5", "stesp.*model.n_heads=0.*log_every"),
        ("a.yaml", "steps: 3\ntrain: {steps: 4}", "train.steps: given twice"),
        ("a.yaml", "steps: 3\nsteps: 4", "steps: given twice"),
        ("a.json", '{"steps": 3, "steps": 4}', "steps: given twice"),
        ("a.json", "steps: 3", "not JSON"),
        ("a.yaml", "steps: [", "not YAML"),
        ("a.yaml", "- steps", "expected settings by name"),
        ("a.yaml", "", "expected settings by name"),
        ("a.yaml", "training: {steps: 3}", "no section; the sections are model"),
        ("a.yaml", "task: contrastive", "settings of task contrastive, not pretrain"),
        ("a.yaml", "label: no", "must be of type str"),
        ("a.yaml", "b1: .nan", "must be a finite number"),
        ("a.toml", "steps = 3", "ends in .yaml"),
    ],
)
def test_a_wrong_file_is_named_and_explained(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        with_config_file(RunConfig(), tmp_path / name).validate()


def test_a_missing_file_is_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        with_config_file(RunConfig(), tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        (tmp_path / "folder.yaml").mkdir()
        with_config_file(RunConfig(), tmp_path / "folder.yaml")


def test_every_section_can_be_replaced(tmp_path):
    run = for_task("small", "classify")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, label="composer"))
    assert with_config_file(RunConfig(task="classify"), write_config(run, tmp_path)) == run
