"""Embeddings: the reference's numbers, batches that change nothing, files that cannot be read."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.embed.baselines import BASELINES, baseline_encoder
from aria_jax.embed.export import embed_pieces, length_buckets, model_encoder
from aria_jax.embed.pieces import midi_slices, read_pieces
from aria_jax.embed.table import read_embeddings, write_embeddings
from aria_jax.interop.safetensors import import_model
from aria_jax.models.heads import build_model
from data_pipeline.errors import UserError
from data_pipeline.midi import read_midi, write_midi
from data_pipeline.tokenizer import Tokenizer
from tests.corpora import random_performance

TOKENIZER = Tokenizer.preset("aria")
CONFIG = ModelConfig(d_model=16, n_heads=2, n_layers=2, head="embedding", emb_size=8)


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, ComputeConfig(), rngs=nnx.Rngs(params=0))


def no_reject(path, reason, message):
    raise AssertionError(f"{path} was rejected: {message}")


def test_whole_files_as_the_reference_embeds_them(golden, real_midi):
    case = json.loads((golden / "model" / "file_embeddings.json").read_text())
    model = import_model(golden / "model" / "emb.safetensors", n_heads=4)
    encode = model_encoder(model, TOKENIZER.pad_id)
    for path, expected in case["embeddings"].items():
        slices = midi_slices(
            read_midi(real_midi / path), TOKENIZER, case["notes_per_chunk"], case["max_seq_len"]
        )
        found = encode(slices).mean(0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_batches_equal_one_slice_at_a_time(corpus, model):
    _, pieces = read_pieces(corpus, TOKENIZER, slice_notes=30, max_tokens=200, reject=no_reject)
    slices = [ids for piece in pieces for ids in piece.slices]
    together = model_encoder(model, TOKENIZER.pad_id)(slices)
    alone = jax.jit(lambda ids, eos: model.pooled(ids, eos))
    for i in range(0, len(slices), 17):
        one = alone(slices[i][None].astype(np.int32), np.array([len(slices[i]) - 1]))
        np.testing.assert_allclose(together[i], one[0], rtol=1e-5, atol=1e-5)


def test_buckets_cover_each_slice_once_and_pad_little():
    rng = np.random.default_rng(0)
    slices = [np.ones(n, np.uint16) for n in rng.integers(2, 2048, 500)]
    seen, used, padded = [], 0, 0
    for chosen, tokens, eos in length_buckets(slices, TOKENIZER.pad_id):
        seen += chosen.tolist()
        used += sum(len(slices[i]) for i in chosen)
        padded += len(chosen) * tokens.shape[1]
        assert all(eos[row] == len(slices[i]) - 1 for row, i in enumerate(chosen))
    assert sorted(seen) == list(range(500))
    assert used / padded > 0.9


def test_labels_never_reach_the_network(corpus):
    _, pieces = read_pieces(corpus, TOKENIZER, slice_notes=50, max_tokens=512, reject=no_reject)
    composer = {TOKENIZER.id_of(("prefix", "composer", c)) for c in ("bach", "chopin", "liszt")}
    for piece in pieces:
        assert piece.labels["composer"] and piece.labels["split"] in ("train", "val")
        assert not composer & {int(i) for ids in piece.slices for i in ids}


def test_unreadable_files_are_named_and_the_rest_goes_on(tmp_path, model):
    rng = np.random.default_rng(0)
    write_midi(random_performance(rng, 50), tmp_path / "a.mid")
    (tmp_path / "b.mid").write_bytes(b"not MIDI")
    rejected = []
    n, pieces = read_pieces(
        tmp_path, TOKENIZER, slice_notes=30, max_tokens=100,
        reject=lambda path, reason, message: rejected.append((path, reason)),
    )  # fmt: skip
    table = embed_pieces(pieces, model_encoder(model, TOKENIZER.pad_id), fingerprint="x")
    assert n == 2 and list(table.path) == ["a.mid"] and rejected == [("b.mid", "not-midi")]


def test_a_table_reads_back_what_was_written(corpus, tmp_path):
    _, pieces = read_pieces(corpus, TOKENIZER, slice_notes=50, max_tokens=512, reject=no_reject)
    table = embed_pieces(
        list(pieces), baseline_encoder("statistics", TOKENIZER), fingerprint="f", per_slice=True
    )
    write_embeddings(table, tmp_path / "e.parquet")
    back = read_embeddings(tmp_path / "e.parquet")
    np.testing.assert_array_equal(back.embedding, table.embedding)
    assert back.labels == list(table.labels) and back.fingerprint == "f"
    assert back.path[0].endswith("#0")


def test_a_model_without_embedding_head_is_refused():
    lm = build_model(ModelConfig(16, 2, 1), ComputeConfig(), rngs=nnx.Rngs(params=0))
    with pytest.raises(UserError, match="not an embedding head"):
        model_encoder(lm, TOKENIZER.pad_id)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_finite_and_tell_music_apart(name):
    rng = np.random.default_rng(0)
    low = random_performance(rng, 80)
    high = random_performance(rng, 80)
    ids = [TOKENIZER.encode(p).astype(np.int64) for p in (low, high)]
    values = [BASELINES[name](i, TOKENIZER) for i in ids]
    assert all(np.isfinite(v).all() for v in values) and not np.allclose(*values)
    nothing = np.array([TOKENIZER.bos_id, TOKENIZER.eos_id])
    assert np.isfinite(BASELINES[name](nothing, TOKENIZER)).all()
