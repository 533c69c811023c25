"""Our network computes what the reference's PyTorch network computes (float32, 1e-5)."""

import json

import jax
import numpy as np
import pytest

from aria_jax.checkpoints.safetensors import export_model, import_model


def load(golden, name):
    config = json.loads((golden / "model" / "config.json").read_text())
    return import_model(golden / "model" / f"{name}.safetensors", n_heads=config["n_heads"])


@pytest.fixture(scope="module")
def io(golden):
    return np.load(golden / "model" / "io.npz")


def close(actual, desired):
    # Relative to the largest value: single entries near zero carry only rounding noise.
    scale = np.abs(desired).max()
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=1e-5, atol=1e-5 * scale)


def ends(logits, io):
    """The logits that the golden file keeps: of eight positions, in the small set of 200 ids."""
    chosen = io["logit_ids"] if "logit_ids" in io else slice(None)
    return np.concatenate([logits[:, :4], logits[:, -4:]], axis=1)[..., chosen]


def test_language_model(golden, io):
    logits = load(golden, "lm")(io["ids"])
    close(ends(logits, io), io["lm_logits_first4_last4"])
    nll = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits[:, :-1])), io["ids"][:, 1:, None].astype(int), -1
    )[..., 0]
    close(nll, io["lm_nll_per_token"])


@pytest.mark.parametrize("name", ["emb", "cl"])
def test_embedding_and_class_heads(golden, io, name):
    close(load(golden, name)(io["ids"]), io[name])


def test_conditioned_language_model(golden, io):
    model = load(golden, "lm_cnd")
    with_condition = model(io["ids"], condition_BxE=io["cnd_emb"])
    assert with_condition.shape[1] == io["ids"].shape[1] - 1
    close(ends(with_condition, io), io["cnd_logits_first4_last4"])
    close(ends(model(io["ids"]), io), io["cnd_logits_noemb_first4_last4"])


def test_export_is_the_inverse_of_import(golden, tmp_path):
    from safetensors.numpy import load_file

    for name in ("lm", "emb", "cl", "lm_cnd"):
        export_model(load(golden, name), tmp_path / "out.safetensors")
        desired, actual = (
            load_file(golden / "model" / f"{name}.safetensors"),
            load_file(tmp_path / "out.safetensors"),
        )
        assert desired.keys() == actual.keys()
        for key in desired:
            np.testing.assert_array_equal(actual[key], desired[key])
