"""How a run begins: one test per case, and what a resumed run refuses."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from aria_jax.checkpoints import hub, newest_record
from aria_jax.checkpoints.models import load_model
from aria_jax.checkpoints.safetensors import export_model
from aria_jax.train.loop import run
from aria_jax.train.tasks import resolve
from data_pipeline.errors import UserError


def stop_at(step):
    return lambda done: done == step


@contextmanager
def saved_record(workdir):
    """The record of the run's checkpoint of step 0, to be changed as an earlier version had it."""
    (path,) = (workdir / "checkpoints" / "0" / "record").glob("metadata")
    record = json.loads(path.read_text())
    record.pop("digest", None)
    yield record
    path.write_text(json.dumps(record))


def test_own_checkpoint_first(config, corpus, tmp_path):
    """The same command, with its --init-from, resumes; also when that has been trained on since."""
    other, options = tmp_path / "other", {"init_from": tmp_path / "other"}
    run(config(), corpus, other, should_stop=stop_at(1))
    run(config(), corpus, tmp_path / "run", **options, should_stop=stop_at(1))
    run(config(), corpus, other, should_stop=stop_at(2))
    result = run(config(), corpus, tmp_path / "run", **options, should_stop=stop_at(2))
    assert result.init.kind == "resume" and result.final_step == 2
    shutil.copytree(other, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("checkpoints/2"):
        shutil.rmtree(path)
    again = run(config(), corpus, tmp_path / "run", init_from=tmp_path / "copy")
    assert again.init.kind == "resume", "the same weights elsewhere"


def test_a_run_that_began_otherwise_is_not_silently_resumed(config, corpus, tmp_path):
    for name in ("run", "other"):
        run(config("pretrain", "steps=0"), corpus, tmp_path / name)
    with pytest.raises(UserError, match=r"began from random weights.*leave it out.*another --work"):
        run(config("pretrain", "steps=1"), corpus, tmp_path / "run", init_from=tmp_path / "other")
    assert load_model(tmp_path / "run").step == 0


@pytest.fixture
def other_corpus(corpus, tmp_path):
    """The same pieces, but a manifest that says something else of them."""
    other = tmp_path / "other-corpus"
    shutil.copytree(corpus, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "n_tokens": -1}))
    return other


def test_another_corpus_is_refused_unless_allowed(config, corpus, other_corpus, tmp_path):
    work = tmp_path / "run"
    run(config("pretrain", "steps=1"), corpus, work)
    shutil.copytree(corpus, tmp_path / "moved")
    assert run(config("pretrain", "steps=1"), tmp_path / "moved", work).init.kind == "resume"
    ways = r"corpus: was .*, is .*other-corpus.*another --workdir, or .*--allow-change data"
    with pytest.raises(UserError, match=ways):
        run(config("pretrain", "steps=2"), other_corpus, work)
    with pytest.warns(UserWarning, match="going on although it changed, as asked: corpus"):
        run(config("pretrain", "steps=2"), other_corpus, work, allow_change=["data"])
    with pytest.raises(UserError, match=r"corpus: was .*other-corpus"):
        run(config("pretrain", "steps=3"), corpus, work)


def test_another_compute_dtype_is_refused_unless_allowed(config, corpus, tmp_path):
    run(config("pretrain", "steps=1"), corpus, tmp_path)
    half = config("pretrain", "steps=2", "dtype=bfloat16")
    with pytest.raises(UserError, match=r"compute.dtype: was float32, is bfloat16.*change dtype"):
        run(half, corpus, tmp_path)
    with pytest.raises(UserError, match=r"--allow-change colour: expected .* data, dtype"):
        run(half, corpus, tmp_path, allow_change=["colour"])
    with pytest.warns(UserWarning, match=r"compute\.dtype: was float32, is bfloat16"):
        assert run(half, corpus, tmp_path, allow_change=["data", "dtype"]).final_step == 2


def test_accelerators_compute_in_bfloat16_and_a_resumed_run_in_what_it_began_with(
    config, corpus, tmp_path
):
    def dtype(*where, **kwargs):
        return resolve(config("pretrain"), corpus, *where, **kwargs).compute.dtype

    assert (dtype(), dtype(accelerator=True)) == ("float32", "bfloat16")
    run(config("pretrain", "steps=1", "dtype=bfloat16"), corpus, tmp_path)
    assert (dtype(tmp_path), dtype(tmp_path, accelerator=False)) == ("bfloat16",) * 2
    assert run(config("pretrain", "steps=2"), corpus, tmp_path).init.kind == "resume"
    assert newest_record(tmp_path)["config"]["compute"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"compute.dtype: was bfloat16, is float32"):
        run(config("pretrain", "steps=3", "dtype=float32"), corpus, tmp_path)


def test_a_checkpoint_that_names_no_corpus_is_resumed_and_says_so(config, corpus, tmp_path):
    run(config("pretrain", "steps=0"), corpus, tmp_path)
    with saved_record(tmp_path) as record:
        del record["corpus"]
    with pytest.warns(UserWarning, match="do not say which corpus"):
        assert run(config("pretrain", "steps=0"), corpus, tmp_path).init.kind == "resume"


def test_no_run_lives_in_a_corpus(config, other_corpus):
    before = sorted(other_corpus.rglob("*"))
    for workdir in (other_corpus, other_corpus / "run"):
        with pytest.raises(UserError, match="nothing is written into a corpus"):
            run(config(), other_corpus, workdir)
    assert sorted(other_corpus.rglob("*")) == before


def test_the_beginning_is_decided_without_jax():
    code = "import sys, aria_jax.train.init; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_given_checkpoint_gives_backbone_and_new_head(config, corpus, tmp_path, weights):
    run(config(), corpus, tmp_path / "lm", should_stop=stop_at(1))
    result = run(
        config("contrastive", "steps=0"), corpus, tmp_path / "emb", init_from=tmp_path / "lm"
    )
    assert result.init.kind == "checkpoint"
    actual, desired = weights(tmp_path / "emb"), weights(tmp_path / "lm")
    jax.tree.map(np.testing.assert_array_equal, actual["backbone"], desired["backbone"])
    assert actual["head"].shape == (32, 16)


def test_published_weights_are_converted(config, corpus, tmp_path, weights):
    run(config("pretrain", "steps=1"), corpus, tmp_path / "lm")
    export_model(load_model(tmp_path / "lm").model, tmp_path / "lm.safetensors")
    result = run(
        config("pretrain", "steps=0"), corpus, tmp_path / "b", init_from=tmp_path / "lm.safetensors"
    )
    assert result.init.kind == "published"
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "b"), weights(tmp_path / "lm"))


def test_weights_by_name_need_nothing_of_the_hub_once_the_run_has_begun(
    config, corpus, tmp_path, weights, model_hub
):
    """The branch moves, the cache is lost and the hub is gone: none of it matters any more."""
    run(config("pretrain", "steps=0"), corpus, tmp_path / "base")
    export_model(load_model(tmp_path / "base").model, tmp_path / hub.FILE)
    name = "hf://some/one"
    commit = model_hub.put("some/one", {hub.FILE: (tmp_path / hub.FILE).read_bytes()})
    settings = config("pretrain", "steps=0", "seed=1")
    result = run(settings, corpus, tmp_path / "run", init_from=name)
    assert result.init.message.endswith(f"published weights {name}@{commit}")
    began = newest_record(tmp_path / "run")["init_from"]
    assert (began["path"], began["commit"]) == (name, f"{name}@{commit}")
    jax.tree.map(
        np.testing.assert_array_equal, weights(tmp_path / "run"), weights(tmp_path / "base")
    )
    adapters = tmp_path / "adapters"  # which need the weights that they were trained on
    run(config("pretrain", "steps=0", "lora_rank=2"), corpus, adapters, init_from=name)
    assert newest_record(adapters)["lora"]["base"] == f"{name}@{commit}"
    model_hub.put("some/one", {hub.FILE: b"another"})
    hub._found.clear()  # as another process, which is told of the new commit
    assert load_model(adapters).adapted
    model_hub.down()
    hub._found.clear()
    shutil.rmtree(tmp_path / "cache")
    again = run(settings, corpus, tmp_path / "run", init_from=name)
    assert again.init.kind == "resume"
    with pytest.raises(UserError, match=r"it is not whole on this disk"):
        run(settings, corpus, tmp_path / "run", init_from=f"{name}@v2")


def test_scratch_otherwise(config, corpus, tmp_path):
    result = run(config("pretrain", "steps=0"), corpus, tmp_path)
    assert result.init.kind == "scratch" and "scratch" in result.init.message


def test_anything_else_is_a_user_error(config, corpus, tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint nor"):
        run(config(), corpus, tmp_path, init_from=tmp_path / "nothing")


def test_a_changed_setting_is_refused_by_name(config, corpus, tmp_path):
    run(config("pretrain", "steps=0"), corpus, tmp_path)
    with pytest.raises(UserError, match=r"optimizer.peak_lr: was 0.001, is 0.5"):
        run(config("pretrain", "peak_lr=0.5"), corpus, tmp_path)


def test_another_tokenizer_is_refused_by_name(config, corpus, tmp_path):
    run(config("pretrain", "steps=0"), corpus, tmp_path)
    with saved_record(tmp_path) as record:
        record["tokenizer"]["hash"] = "0" * 64
    with pytest.raises(UserError, match=r"tokenizer\.hash: was 0000"):
        run(config("pretrain", "steps=0"), corpus, tmp_path)


def test_a_setting_that_an_older_version_did_not_know_has_its_default(config, corpus, tmp_path):
    run(config("pretrain", "steps=0"), corpus, tmp_path)
    with saved_record(tmp_path) as record:
        del record["config"]["optimizer"]["ema_decay"]
    assert run(config("pretrain", "steps=0"), corpus, tmp_path).init.kind == "resume"


def test_steps_and_mesh_may_change(config, corpus, tmp_path):
    run(config("pretrain", "steps=1"), corpus, tmp_path)
    assert run(config("pretrain", "steps=2"), corpus, tmp_path).final_step == 2
