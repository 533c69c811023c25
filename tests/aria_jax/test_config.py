"""Settings: what is accepted, what is refused, and how it is said."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.config import (
    SECTIONS,
    SETTINGS,
    RunConfig,
    to_dict,
    with_overrides,
)
from aria_jax.models import parameter_count
from aria_jax.models.heads import parameter_specs
from aria_jax.presets import MODELS, for_task
from data_pipeline.errors import UserError
from data_pipeline.settings import Setting, field_docs, from_dict, settings_of


def test_medium_is_the_papers_model():
    model = for_task("medium", "pretrain").model
    assert (model.d_model, model.n_layers, model.n_heads, model.max_seq_len) == (1536, 16, 24, 8192)
    assert parameter_count(parameter_specs(model)) == pytest.approx(0.658e9, rel=0.01)


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize("task", ["pretrain", "continue", "contrastive"])
def test_every_preset_of_every_task_is_valid_and_survives_json(preset, task):
    config = for_task(preset, task).validate()
    assert from_dict(RunConfig, to_dict(config)) == config
    by_instrument = config.augmentation.instrument_velocity, config.augmentation.instrument_drop
    assert (by_instrument != (0, 0)) == (preset == "multitrack" and task != "continue")


@pytest.mark.parametrize(
    "text, read",
    [
        ("steps=20", lambda c: c.train.steps == 20),
        ("steps=1e3", lambda c: c.train.steps == 1000),
        ("optimizer.peak_lr=1e-4", lambda c: c.optimizer.peak_lr == 1e-4),
        ("clip_norm=none", lambda c: c.optimizer.clip_norm is None),
        ("augment=false", lambda c: c.data.augment is False),
        ("pitch=3", lambda c: c.augmentation.pitch == 3 and c.augmentation.tempo == 0.2),
        ("dtype=bfloat16", lambda c: c.compute.dtype == "bfloat16"),
        ("class_names=a,b", lambda c: c.model.class_names == ("a", "b")),
    ],
)
def test_overrides_are_typed(text, read):
    assert read(with_overrides(RunConfig(), [text]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("stesp=1", "nearest: steps"),
        ("steps", "not of the form key=value"),
        ("steps=many", "must be of type int"),
        ("augment=perhaps", "must be true or false"),
        ("augmentation.tempo=2", "tempo=2.0 must lie in"),
        ("dtype=float64", "must be one of auto, float32, bfloat16"),
    ],
)
def test_wrong_overrides_are_explained(text, message):
    with pytest.raises(UserError, match=message):
        with_overrides(RunConfig(), [text])


def test_all_problems_are_told_together():
    config = with_overrides(for_task("tiny", "pretrain"), ["n_heads=5", "peak_lr=0", "steps=-1"])
    assert len(config.problems()) >= 3


def test_a_setting_of_a_newer_version_is_refused():
    with pytest.raises(UserError, match="newer aria_jax"):
        from_dict(RunConfig, {"colour": "red"})


def test_continuing_is_one_epoch_of_short_pieces_unless_told_otherwise():
    config = for_task("medium", "continue")
    assert (config.train.epochs, config.data.max_piece_tokens) == (1.0, 8192)
    assert for_task("medium", "pretrain").train.epochs is None
    assert with_overrides(config, ["steps=7"]).train.epochs is None
    both = with_overrides(config, ["epochs=2", "steps=7"])
    assert both.train.epochs == 2.0


def test_adapters_are_settings_like_others():
    config = with_overrides(RunConfig(), ["lora_rank=8", "lora_targets=qkv,out"]).validate()
    assert (config.train.lora_rank, config.train.lora_targets) == (8, ("qkv", "out"))
    for wrong in ("lora_rank=-1", "lora_alpha=0"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            with_overrides(RunConfig(), [wrong]).validate()


def has_problem(name: str, value: object) -> bool:
    """Whether a run in which only this setting is changed is refused, naming the setting."""
    section, _, field = name.partition(".")
    config = RunConfig()
    try:
        changed = dataclasses.replace(getattr(config, section), **{field: value})
    except UserError as error:
        return field in str(error)
    found = dataclasses.replace(config, **{section: changed}).problems()
    return any(problem.startswith(f"{name}={value} ") for problem in found)


def outside(setting: Setting) -> st.SearchStrategy:
    """Numbers that a setting's range leaves out, its own limits and beyond."""
    bounds, whole = setting.range, "int" in setting.type_name
    low, high = bounds.low, bounds.high
    numbers = [st.integers(max_value=int(low) - 1) if whole else st.floats(max_value=low - 1e-6)]
    if math.isfinite(high):
        numbers.append(
            st.integers(min_value=int(high) + 1) if whole else st.floats(min_value=high + 1e-6)
        )
    edges = [low] * bounds.above + [high] * bounds.below
    return st.one_of(*numbers, *map(st.just, edges)).filter(lambda n: n not in bounds.also)


def test_there_is_no_setting_without_docstring_and_no_number_without_range():
    for section, cls in SECTIONS.items():
        assert set(field_docs(cls)) == {one.name for one in settings_of(cls)}, section
    for name, setting in SETTINGS.items():
        if setting.type_name.startswith(("int", "float")):
            assert setting.range is not None, name


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_a_setting_may_not_hold_is_a_problem(name, data):
    setting = SETTINGS[name]
    wrong = [st.just(object()), st.just("no such choice"), st.just([1]), st.just(b"x")]
    if setting.type_name.startswith(("int", "float")):
        wrong = [
            outside(setting),
            st.sampled_from([math.nan, math.inf, -math.inf, True, "3", (1,), 2.5j, 10**400]),
        ]
    elif setting.type_name.startswith("str"):
        wrong = [st.sampled_from(["", " ", 3, True, ("a",)])]
    elif setting.type_name.startswith("list"):
        wrong = [st.sampled_from(["a", ["a"], (1,), ("",), None])]
    elif setting.type_name == "bool":
        wrong = [st.sampled_from([0, 1, 2, -1, "true", None])]
    else:
        wrong += [st.just(None), st.just(1), st.just(""), st.text(min_size=12)]
    if "none" not in setting.type_name:
        wrong.append(st.none())
    assert has_problem(name, data.draw(st.one_of(*wrong)))


@pytest.mark.parametrize("name", SETTINGS)
def test_defaults_are_no_problem_and_survive_the_command_line(name):
    setting = SETTINGS[name]
    assert setting.problem(setting.default) is None
    text = ",".join(setting.default) if isinstance(setting.default, tuple) else setting.default
    assert setting.read(str(text)) == setting.default


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(sorted(SETTINGS.keys() - {"model.d_model"})), max_size=6))
def test_every_wrong_setting_is_named_in_one_message(names):
    assignments = []
    for name in names:
        if SETTINGS[name].type_name.startswith(("int", "float", "bool", "one of")):
            assignments.append(f"{name}=-7")
    with pytest.raises(UserError) as caught:
        with_overrides(RunConfig(), [*assignments, "model.d_model=0", "stesp=1"])
    assert all(one.partition(".")[2] in str(caught.value) for one in assignments)
    assert "model.d_model=0 " in str(caught.value) and "nearest: steps" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["n_heads=0", "log_every=0", "seed=-1", "b1=2", "eps=nan", "clip_norm=inf", "z_loss=-1"]
)
def test_what_would_have_failed_late_or_never_is_refused(text):
    with pytest.raises(UserError, match=text.partition("=")[0]):
        with_overrides(RunConfig(), [text]).validate()
