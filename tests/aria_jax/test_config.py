"""Settings: what is accepted, what is refused, and how it is said."""

import pytest

from aria_jax.config import RunConfig, from_dict, to_dict, with_overrides
from aria_jax.presets import for_task
from data_pipeline.errors import UserError


def test_medium_is_the_papers_model():
    model = for_task("medium", "pretrain").model
    assert (model.d_model, model.n_layers, model.n_heads, model.max_seq_len) == (1536, 16, 24, 8192)
    assert model.n_params == pytest.approx(0.658e9, rel=0.01)


@pytest.mark.parametrize("preset", ["tiny", "small", "medium"])
@pytest.mark.parametrize("task", ["pretrain", "continue", "contrastive"])
def test_every_preset_of_every_task_is_valid_and_survives_json(preset, task):
    config = for_task(preset, task).validate()
    assert from_dict(RunConfig, to_dict(config)) == config


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
        ("dtype=float64", "must be one of float32, bfloat16"),
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
