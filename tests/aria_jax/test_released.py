"""The weights that come with the package: what they are, how large, and what they say."""

import hashlib

import numpy as np
import pytest

import aria_jax
from aria_jax.checkpoints import RELEASED, RELEASED_NAMES, check_model, model_path
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer

ARIA = Tokenizer.preset("aria")
SHA256 = {
    "mini": "ee2a082a982cfc7bb2703d1380d96a1130789aca2d917d30f2b94566a53a4efc",
    "mini-embedding": "841d82c672a33b33631d5c5b1a109ba5bd5f494b7a4175934dae92f39fe7cb58",
}
SCALE_NLL = 3.8843
"""Nats per token of `c_major`, float32, default XLA."""
SCALE_EMBEDDING = [0.2303, 1.0020, -0.4810, 0.3701]
"""The first four of 512 numbers of `c_major`, likewise."""
PIANO = ARIA.id_of(("prefix", "instrument", "piano"))
SCALE = [(60, 0), (62, 400), (64, 800), (65, 1200), (67, 1600), (69, 2000), (71, 2400), (72, 2800)]


def c_major() -> list[int]:
    """A scale of eight notes, 600 ms each."""
    ids = [PIANO, ARIA.bos_id]
    for pitch, onset in SCALE:
        ids += map(ARIA.id_of, [("piano", pitch, 60), ("onset", onset), ("dur", 600)])
    return ids


@pytest.fixture(scope="module")
def mini():
    return aria_jax.load("mini")


@pytest.mark.parametrize("name", RELEASED_NAMES)
def test_the_card_describes_this_file(name):
    data = (RELEASED / f"{name}.safetensors").read_bytes()
    assert len(data) < 15e6
    assert hashlib.sha256(data).hexdigest() == SHA256[name]
    card = (RELEASED / f"{name}.md").read_text()
    for word in ("CC BY 4.0", "GiantMIDI", "Kong", "## Training", "## Limits", SHA256[name][:16]):
        assert word in card, word


def test_a_folder_of_that_name_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_path("mini") == RELEASED / "mini.safetensors"
    (tmp_path / "mini").mkdir()
    assert str(model_path("mini")) == "mini"
    with pytest.raises(UserError, match="no checkpoint here"):
        check_model("mini")


def test_mini_knows_how_likely_a_scale_is(mini):
    assert mini.config.n_rows < 3_000 < mini.config.vocab_size == 17_727
    assert (mini.tokenizer, mini.reading) == ("aria", "standard")
    found = aria_jax.score(mini, aria_jax.detokenise(c_major())).mean_nll
    assert found == pytest.approx(SCALE_NLL, abs=1e-2)  # float32 sums on other machines


def test_mini_embedding_gives_the_vector_it_gave():
    loaded = aria_jax.load("mini-embedding")
    assert (loaded.tokenizer, loaded.reading, loaded.slices) == ("aria", "standard", (127, 384))
    vector = aria_jax.embed(loaded, aria_jax.detokenise(c_major()))
    assert vector.shape == (512,)
    np.testing.assert_allclose(vector[:4], SCALE_EMBEDDING, atol=2e-3)
