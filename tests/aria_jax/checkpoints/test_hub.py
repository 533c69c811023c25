"""Weights by name, through the hub's own client and a hub on loopback."""

import argparse
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from aria_jax.checkpoints import check_model, hub, model_digest, model_path
from aria_jax.checkpoints.models import load_model
from aria_jax.checkpoints.safetensors import export_model, import_model
from aria_jax.cli.main import MODELS, VERBS, main
from aria_jax.models.heads import split_model
from data_pipeline.errors import UserError

NAME = "hf://some/one"


@pytest.fixture(scope="module")
def weights(tiny_models, tmp_path_factory) -> bytes:
    """Of a language model with two heads of 8, as this project writes them."""
    file = tmp_path_factory.mktemp("weights") / hub.FILE
    export_model(load_model(tiny_models["lm"]).model, file)
    return file.read_bytes()


def again() -> None:
    """As another process would begin."""
    hub._found.clear()


def test_a_name_is_a_file_here_that_is_asked_for_once(model_hub, weights):
    commit = model_hub.put("some/one", {hub.FILE: weights, "pytorch_model.bin": b"pickle"})
    path = model_path(NAME)
    assert path.read_bytes() == weights
    assert hub.pinned(NAME) == f"{NAME}@{commit}"
    assert model_digest(NAME) == model_digest(path) == model_digest(Path(NAME))
    check_model(NAME)
    asked = sum(model_hub.asked.values())
    model_path(NAME)
    assert sum(model_hub.asked.values()) == asked
    assert not [one for one in model_hub.asked if ".bin" in one]


def test_a_revision_is_a_branch_a_tag_or_a_commit(model_hub, weights):
    first = model_hub.put("some/one", {hub.FILE: weights}, "v1")
    model_hub.put("some/one", {hub.FILE: b"another"}, "main")
    assert model_path(f"{NAME}@v1").read_bytes() == weights
    again()
    before = model_hub.asked.copy()
    assert model_path(f"{NAME}@{first}").read_bytes() == weights
    assert model_hub.asked == before  # it can be nothing else than what is here
    with pytest.raises(UserError, match="no branch, tag or commit v3"):
        model_path(f"{NAME}@v3")


def test_a_branch_that_moved_is_brought_again(model_hub, weights):
    model_hub.put("some/one", {hub.FILE: b"before"})
    assert model_path(NAME).read_bytes() == b"before"
    model_hub.put("some/one", {hub.FILE: weights})
    assert model_path(NAME).read_bytes() == b"before"  # a process sees one model under a name
    again()
    assert model_path(NAME).read_bytes() == weights


def test_bytes_that_the_hub_did_not_promise_are_refused(model_hub, weights):
    model_hub.put("some/one", {hub.FILE: weights})
    model_hub.lies[hub.FILE] = weights[:-1] + b"?"
    with pytest.raises(UserError, match=r"other bytes .* than the hub promises"):
        model_path(NAME)
    del model_hub.lies[hub.FILE]
    assert model_path(NAME).read_bytes() == weights  # nothing of them was kept


def test_a_file_that_rots_in_the_cache_is_brought_again(model_hub, weights):
    model_hub.put("some/one", {hub.FILE: weights})
    model_path(NAME).resolve().write_bytes(weights[:-1] + b"?")
    again()
    with pytest.raises(UserError, match="was removed; run the same command again"):
        model_path(NAME)
    assert model_path(NAME).read_bytes() == weights


def test_a_download_that_breaks_off_goes_on(model_hub, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    model_hub.put("some/one", {hub.FILE: weights})
    model_hub.broken = 2
    assert model_path(NAME).read_bytes() == weights
    assert model_hub.broken == 0


def test_one_that_does_not_end_leaves_nothing_behind(model_hub, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda s: model_hub.down())
    model_hub.put("some/one", {hub.FILE: weights})
    model_hub.broken = 9
    with pytest.raises(UserError, match=r"not whole on this disk.*run the same command again"):
        model_path(NAME)
    cache = Path(sys.modules["huggingface_hub.constants"].HF_HUB_CACHE)
    assert not [file for file in cache.rglob("blobs/*") if file.stat().st_size]


def test_without_a_connection_the_cache_is_taken_and_it_says_so(model_hub, weights, capsys):
    commit = model_hub.put("some/one", {hub.FILE: weights})
    model_path(NAME)
    model_hub.down()
    again()
    with pytest.warns(UserWarning, match=rf"does not answer .*{commit[:12]} from the cache"):
        assert model_path(NAME).read_bytes() == weights
    again()
    out = str(model_path(f"{NAME}@{commit}"))  # asks nothing, and says nothing
    assert commit in out
    with pytest.raises(UserError, match="hf://some/other: it is not whole on this disk"):
        model_path("hf://some/other")


def test_offline_mode_asks_nobody(model_hub, weights, monkeypatch):
    model_hub.put("some/one", {hub.FILE: weights})
    model_path(NAME)
    again()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = model_hub.asked.copy()
    with pytest.warns(UserWarning, match="OfflineModeIsEnabled"):
        model_path(NAME)
    assert model_hub.asked == asked


@pytest.mark.parametrize(
    "files, says",
    [
        ({"pytorch_model.bin": b"x", "a.pkl": b"x"}, "only a.pkl, pytorch_model.bin: pickles can"),
        ({"model-gen.safetensors": b"x"}, "only model-gen.safetensors; download that file"),
        ({"README.md": b"x"}, "holds no weights"),
    ],
)
def test_what_is_no_safetensors_is_never_asked_for(model_hub, files, says):
    model_hub.put("some/one", files)
    with pytest.raises(UserError, match=says):
        model_path(NAME)
    assert not [one for one in model_hub.asked if "/resolve/" in one]


def test_a_pickle_under_the_name_of_safetensors_is_not_read(model_hub):
    model_hub.put("some/one", {hub.FILE: pickle.dumps({"lm_head.weight": [1.0]})})
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(NAME)


@pytest.mark.parametrize(
    "name, says",
    [
        ("hf://some", "expected hf://OWNER/NAME"),
        ("hf://some/one/model.safetensors", "expected hf://OWNER/NAME"),
        ("hf://some/nothing", "no such repository, or hides it"),
        ("hf://some/closed", "lets in only those who asked"),
    ],
)
def test_names_that_lead_nowhere(model_hub, name, says, capsys):
    model_hub.put("some/closed", {hub.FILE: b"x"})
    model_hub.gated.add("some/closed")
    assert main(["score", "some.mid", "--checkpoint", name]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"aria-jax: error: {name}") and says in said


def test_every_option_that_takes_a_model_takes_a_name():
    """`bring` knows them by their names: whatever verb has one, asks the hub before it begins."""

    def options(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in set(action.choices.values()):
                    yield from options(sub)
            yield action.dest

    found = set()
    for name, (module, _) in VERBS.items():
        verb = getattr(
            importlib.import_module(f"aria_jax.cli.{module}"), name.replace("-", "_").upper()
        )
        verb.add_arguments(parser := argparse.ArgumentParser())
        found |= {
            dest for dest in options(parser) if re.search("checkpoint|init_from|^base$", dest)
        }
    assert found == set(MODELS)


def test_weights_are_no_data(model_hub, capsys):
    assert main(["data", "inspect", "hf://some/one"]) == 2
    assert "hf:// names weights" in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'aria-jax\[hub\]'"):
        hub.local("hf://never/asked")


def test_a_process_finds_hub_and_cache_in_its_environment(model_hub, weights, tmp_path):
    model_hub.put("some/one", {hub.FILE: weights})
    code = f"from aria_jax.checkpoints import model_path; print(model_path({NAME!r}))"
    places = {"HF_ENDPOINT": model_hub.address, "HF_HOME": str(tmp_path / "home"),
              "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **places}
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == weights
    assert done.stdout.startswith(str(tmp_path / "home"))


def test_config_json_tells_what_tensors_do_not_show(model_hub, weights):
    """As others publish: tensors alone, and their sizes in config.json."""
    from safetensors.numpy import load, save

    said = {"num_attention_heads": 2, "max_seq_len": 512}
    files = {hub.FILE: save(load(weights)), hub.CONFIG: json.dumps(said).encode()}
    model_hub.put("some/one", files)
    config = load_model(NAME).config
    assert (config.n_heads, config.max_seq_len) == (2, 512)


def folder_of(model: Path, out: Path, capsys) -> dict[str, bytes]:
    assert main(["convert", "to-hub", str(model), str(out)]) == 0
    capsys.readouterr()
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.mark.parametrize("kind", ["lm", "encoder", "classifier"])
def test_a_folder_for_the_hub_comes_back_from_it(kind, tiny_models, model_hub, tmp_path, capsys):
    files = folder_of(tiny_models[kind], tmp_path / "my-model", capsys)
    assert files.keys() == {hub.FILE, hub.CONFIG, hub.CARD}
    model_hub.put("me/my-model", files)
    before, after = load_model(tiny_models[kind]), load_model("hf://me/my-model")
    assert after.config == before.config and after.about == before.about
    two = [split_model(loaded.model)[1] for loaded in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *two)
    # Nor does anything of the architecture live only in this project's own metadata.
    bare = {"num_attention_heads", "max_seq_len", "hidden_size", "vocab_size"}
    assert bare <= json.loads(files[hub.CONFIG]).keys()


def test_the_hubs_client_reads_the_card(tiny_models, model_hub, tmp_path, capsys):
    from huggingface_hub import ModelCard

    files = folder_of(tiny_models["lm"], tmp_path / "my-model", capsys)
    read = ModelCard(files[hub.CARD].decode())
    assert read.data.library_name == "aria_jax" and "midi" in read.data.tags
    assert "hf://OWNER/my-model" in read.text and "{" not in read.text.replace('["reference"]', "")
    said = json.loads(files[hub.CONFIG])
    assert said["architectures"] == ["AriaForCausalLM"]


def test_the_reference_loads_the_same_tensors(golden, tmp_path, capsys):
    """Names, shapes, types and values of the reference's own files, and its own config.

    They come as others publish them: tensors, and their sizes in config.json.
    """
    from safetensors.numpy import load, load_file

    sizes = json.loads((golden / "model" / "config.json").read_text())
    for name, extra in (("lm", ()), ("emb", ("emb_size",)), ("cl", ("class_size",))):
        (tmp_path / name).mkdir()
        source = tmp_path / name / hub.FILE
        source.write_bytes((golden / "model" / f"{name}.safetensors").read_bytes())
        source.with_name(hub.CONFIG).write_text(json.dumps({"num_attention_heads": 4}))
        files = folder_of(source, tmp_path / f"{name}-hub", capsys)
        written, desired = load(files[hub.FILE]), load_file(source)
        assert written.keys() == desired.keys()
        for tensor in desired:
            assert written[tensor].dtype == desired[tensor].dtype
            np.testing.assert_array_equal(written[tensor], desired[tensor])
        said = json.loads(files[hub.CONFIG])["reference"]
        known = ("d_model", "n_heads", "n_layers", "ff_mult", "vocab_size", "drop_p", *extra)
        assert {key: said[key] for key in known} == {key: sizes[key] for key in known}


_PYTORCH = {
    "tok_embeddings": "embedding", "encode_layers": "blocks", "mixed_qkv": "qkv",
    "att_proj_linear": "out", "ff_gate_proj": "gate", "ff_up_proj": "up", "ff_down_proj": "down",
    "out_layer_norm": "norm", "lm_head": "head",
}  # fmt: skip


def test_pytorch_computes_the_same_from_the_folder(tiny_models, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'aria-jax[bench]'")
    from safetensors.torch import load

    from benchmarks.torch_model import Decoder

    files = folder_of(tiny_models["lm"], tmp_path / "my-model", capsys)
    tensors = {
        ".".join(_PYTORCH.get(part, part) for part in name.removeprefix("model.").split(".")): value
        for name, value in load(files[hub.FILE]).items()
    }
    model = import_model(tmp_path / "my-model" / hub.FILE)
    network = Decoder(model.config)
    network.load_state_dict(tensors, strict=True)
    ids = np.arange(1, 60)[None]
    with torch.no_grad():
        found = network(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(model(ids), found, rtol=1e-4, atol=1e-5)
