"""How a run begins: one test per case, and what a resumed run refuses."""

import json

import jax
import numpy as np
import pytest

from aria_jax.checkpoints.models import load_model
from aria_jax.checkpoints.safetensors import export_model
from aria_jax.train.loop import run
from data_pipeline.errors import UserError


def stop_at(step):
    return lambda done: done == step


def test_own_checkpoint_first(config, corpus, tmp_path):
    run(config(), corpus, tmp_path / "run", should_stop=stop_at(1))
    run(config(), corpus, tmp_path / "other", should_stop=stop_at(2))
    result = run(
        config(), corpus, tmp_path / "run", init_from=tmp_path / "other", should_stop=stop_at(2)
    )
    assert result.start.kind == "resume" and result.final_step == 2


def test_given_checkpoint_gives_backbone_and_new_head(config, corpus, tmp_path, weights):
    run(config(), corpus, tmp_path / "lm", should_stop=stop_at(1))
    result = run(
        config("contrastive", "steps=0"), corpus, tmp_path / "emb", init_from=tmp_path / "lm"
    )
    assert result.start.kind == "checkpoint"
    ours, theirs = weights(tmp_path / "emb"), weights(tmp_path / "lm")
    jax.tree.map(np.testing.assert_array_equal, ours["backbone"], theirs["backbone"])
    assert ours["head"].shape == (32, 16)


def test_published_weights_are_converted(config, corpus, tmp_path, weights):
    run(config("pretrain", "steps=1"), corpus, tmp_path / "lm")
    export_model(load_model(tmp_path / "lm").model, tmp_path / "lm.safetensors")
    result = run(
        config("pretrain", "steps=0"), corpus, tmp_path / "b", init_from=tmp_path / "lm.safetensors"
    )
    assert result.start.kind == "published"
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "b"), weights(tmp_path / "lm"))


def test_scratch_otherwise(config, corpus, tmp_path):
    result = run(config("pretrain", "steps=0"), corpus, tmp_path)
    assert result.start.kind == "scratch" and "scratch" in result.start.sentence


def test_anything_else_is_a_user_error(config, corpus, tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint nor"):
        run(config(), corpus, tmp_path, init_from=tmp_path / "nothing")


def test_a_changed_setting_is_refused_by_name(config, corpus, tmp_path):
    run(config("pretrain", "steps=0"), corpus, tmp_path)
    with pytest.raises(UserError, match=r"optimizer.peak_lr: was 0.001, is 0.5"):
        run(config("pretrain", "peak_lr=0.5"), corpus, tmp_path)


def test_another_tokenizer_is_refused_by_name(config, corpus, tmp_path):
    run(config("pretrain", "steps=0"), corpus, tmp_path)
    (path,) = (tmp_path / "checkpoints" / "0" / "record").glob("metadata")
    record = json.loads(path.read_text())
    record["tokenizer"]["hash"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"tokenizer\.hash: was 0000"):
        run(config("pretrain", "steps=0"), corpus, tmp_path)


def test_a_setting_that_an_older_version_did_not_know_has_its_default(config, corpus, tmp_path):
    run(config("pretrain", "steps=0"), corpus, tmp_path)
    (path,) = (tmp_path / "checkpoints" / "0" / "record").glob("metadata")
    record = json.loads(path.read_text())
    del record["config"]["optimizer"]["ema_decay"]
    path.write_text(json.dumps(record))
    assert run(config("pretrain", "steps=0"), corpus, tmp_path).start.kind == "resume"


def test_steps_and_mesh_may_change(config, corpus, tmp_path):
    run(config("pretrain", "steps=1"), corpus, tmp_path)
    assert run(config("pretrain", "steps=2"), corpus, tmp_path).final_step == 2
