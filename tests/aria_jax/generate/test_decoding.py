"""Cached decoding equals the plain network, the reference, itself in any batch and on a mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from aria_jax.config import MeshConfig
from aria_jax.generate.cache import decode_step, empty_cache, prefill
from aria_jax.generate.decoding import Decoding, _advance_chunk, decode
from aria_jax.generate.sampler import Greedy, MinP, RepetitionPenalty, Temperature
from aria_jax.generate.weights import DecodingMatrix, decoder_weights, quantize
from aria_jax.kernels import narrow_cpu
from aria_jax.models import parameter_shardings
from aria_jax.models.heads import parameter_specs, split_model
from aria_jax.sharding import make_mesh
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind

ARIA = Tokenizer.preset("aria")
compiled_prefill, compiled_step = jax.jit(prefill), jax.jit(decode_step)


def generate(model, prompt, *, n=1, seed=0, condition=None, mesh=None, precision="float32", **kw):
    settings = Decoding(**({"max_tokens": 40, "sampler": Greedy()} | kw))
    *_, ids = decode(
        decoder_weights(model, precision),
        ARIA,
        prompt,
        n_sequences=n,
        key=jax.random.key(seed),
        settings=settings,
        condition_E=condition,
        mesh=mesh,
    )
    return ids


@pytest.mark.parametrize("handler", [True, False])
def test_a_step_writes_into_the_cache_and_copies_none(tiny_model, handler, monkeypatch):
    if not handler:
        monkeypatch.setattr(narrow_cpu, "available", lambda: False)
    weights = decoder_weights(tiny_model)
    _, prompt = jax.eval_shape(prefill, weights, jnp.zeros(512, int), jnp.int32(300))
    cache = empty_cache(weights, 2, 24)
    text = (
        jax.jit(lambda *args: decode_step(*args), donate_argnums=2)  # traced anew for each handler
        .lower(weights, prompt, cache, jnp.zeros(2, int), jnp.int32(0))
        .compile()
        .as_text()
    )
    shapes = {
        str(list(part.shape)).replace(" ", "")
        for layer in cache
        for part in (layer.keys, layer.values)
    }
    lines = [line for line in text.splitlines() if any(shape in line for shape in shapes)]
    assert any("dynamic-update-slice" in line or "fusion" in line for line in lines)
    assert not [line for line in lines if " copy(" in line]


def test_cached_steps_equal_the_whole_network(tiny_model):
    """Prefill of 300 ids, then two rows of different ids, one position at a time."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ARIA.vocab_size, (2, 306))
    ids[1, :300] = ids[0, :300]
    expected = nnx.jit(lambda model, ids: model(ids))(tiny_model, jnp.asarray(ids))
    weights = decoder_weights(tiny_model)
    padded = np.full(512, ARIA.pad_id)
    padded[:300] = ids[0, :300]
    logits, prompt = compiled_prefill(weights, jnp.asarray(padded), jnp.int32(300))
    # Sums in another order; logits reach 30.
    np.testing.assert_allclose(logits[0], expected[0, 299], atol=2e-4)
    cache = empty_cache(weights, 2, 8)
    for i in range(300, 306):
        logits, cache = compiled_step(
            weights, prompt, cache, jnp.asarray(ids[:, i]), jnp.int32(i - 300)
        )
        np.testing.assert_allclose(logits, expected[:, i], atol=2e-4)


def test_greedy_equals_the_reference(golden, golden_model):
    expected = json.loads((golden / "generate.json").read_text())
    ids = generate(
        golden_model("lm"), np.array(expected["prompt"]), max_tokens=64, use_grammar=False
    )
    assert ids[0].tolist() == expected["greedy"]


def test_condition_equals_the_reference(golden, golden_model):
    """Logits after each prefix of a conditioned prompt, both branches."""
    with np.load(golden / "model" / "io.npz") as arrays:
        arrays = dict(arrays)
    model = golden_model("lm_cnd")
    weights = decoder_weights(model)
    ids, condition = arrays["ids"][0], arrays["cnd_emb"][0]
    padded = np.full(256, ARIA.pad_id)
    padded[:100] = ids[:100]
    logits, prompt = compiled_prefill(
        weights, jnp.asarray(padded), jnp.int32(100), jnp.asarray(condition)
    )
    tokens = jnp.asarray(ids[None])
    whole = nnx.jit(lambda model, tokens, condition: model(tokens, condition_BxE=condition))
    with_condition = whole(model, tokens, jnp.asarray(condition[None]))
    without = whole(model, tokens, None)
    np.testing.assert_allclose(logits[0], with_condition[0, 99], rtol=1e-4, atol=1e-5)
    # The blind branch still counts positions from 1, but rotary attention sees differences only.
    np.testing.assert_allclose(logits[1], without[0, 99], rtol=1e-4, atol=1e-5)
    assert int(prompt.next_position) == 101
    rows = jnp.asarray(np.repeat(ids[100], 2))
    logits, _ = compiled_step(weights, prompt, empty_cache(weights, 2, 8), rows, jnp.int32(0))
    np.testing.assert_allclose(logits[0], with_condition[0, 100], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[1], without[0, 100], rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_depend_on_the_others(tiny_model, piano_prompt):
    four = generate(tiny_model, piano_prompt, n=4, sampler=MinP())
    one = generate(tiny_model, piano_prompt, n=1, sampler=MinP())
    two = generate(tiny_model, piano_prompt, n=2, sampler=MinP())
    width = one.shape[1]
    np.testing.assert_array_equal(four[0, :width], one[0])
    np.testing.assert_array_equal(four[:2, : two.shape[1]], two)
    assert (four[0] != four[1]).any()
    assert (generate(tiny_model, piano_prompt, n=1, seed=1, sampler=MinP()) != one).any()


def test_chunks_grow_and_do_not_change_the_result(tiny_model, piano_prompt):
    weights = decoder_weights(tiny_model)
    seen = list(
        decode(
            weights,
            ARIA,
            piano_prompt,
            n_sequences=2,
            key=jax.random.key(0),
            settings=Decoding(max_tokens=40, chunk=16),
        )
    )
    assert [ids.shape[1] for ids in seen] == [16, 32, 40]
    np.testing.assert_array_equal(seen[2][:, :16], seen[0])
    whole = generate(tiny_model, piano_prompt, n=2, sampler=MinP(), chunk=40)
    np.testing.assert_array_equal(seen[2], whole)


def test_all_chunks_are_one_program(tiny_model, piano_prompt):
    """Compiling takes most of the time of a short continuation."""
    programs = _advance_chunk._cache_size()
    generate(tiny_model, piano_prompt, max_tokens=37, chunk=9)
    assert _advance_chunk._cache_size() == programs + 1


def test_stops_at_the_end_of_each_sequence(tiny_model, piano_prompt):
    """A model made to love <E>: sequences end at their own time and are padded after it."""
    weights = decoder_weights(tiny_model)
    weights = weights.replace(
        # exp(6) against 1,536 notes of weight 1: about one event in five is <E>.
        head=DecodingMatrix(jnp.zeros_like(weights.head.rows_OxI).at[ARIA.eos_id, 0].set(6.0)),
        norm_scale_D=weights.norm_scale_D.at[0].set(0.0),
        norm_bias_D=weights.norm_bias_D.at[0].set(1.0),
    )
    *_, ids = decode(
        weights,
        ARIA,
        piano_prompt,
        n_sequences=6,
        key=jax.random.key(2),
        settings=Decoding(max_tokens=200, sampler=Temperature(temperature=1.0)),
    )
    ends = [row.tolist().index(ARIA.eos_id) for row in ids]
    assert len(set(ends)) > 1 and max(ends) < 199
    for row, end in zip(ids, ends, strict=True):
        assert (row[end + 1 :] == ARIA.pad_id).all() and (row[:end] != ARIA.pad_id).all()
    assert ids.shape[1] <= max(ends) + 32  # nothing runs on once all have ended


@pytest.mark.parametrize("use_grammar", [True, False])
def test_force_end_puts_one_dim_token_before_an_event(tiny_model, piano_prompt, use_grammar):
    ids = generate(
        tiny_model, piano_prompt, n=3, max_tokens=140, force_end=True, sampler=MinP(p=0.0),
        use_grammar=use_grammar,
    )  # fmt: skip
    for row in ids:
        places = np.flatnonzero(row == ARIA.dim_id)
        if ARIA.eos_id not in row[:11]:
            assert len(places) == 1
        for place in places:
            assert use_grammar is False or ARIA.kind[row[place - 1]] != Kind.NOTE
            assert place <= 12 or not use_grammar


def test_guidance(conditioned_model, piano_prompt):
    """Strength 0 is the model without the condition; 1 reaches the conditioned model."""
    condition = np.linspace(-3, 3, 8)
    plain = generate(conditioned_model, piano_prompt)
    zero = generate(conditioned_model, piano_prompt, condition=condition, guidance=0.0)
    np.testing.assert_array_equal(zero, plain)
    strong = generate(conditioned_model, piano_prompt, condition=condition, guidance=5.0)
    assert (strong != plain).any()
    # Step 1 of a warm-up of 40 weighs the branches 5/40 : 35/40.
    weights = decoder_weights(conditioned_model)
    padded = np.full(256, ARIA.pad_id)
    padded[: len(piano_prompt)] = piano_prompt
    logits, _ = compiled_prefill(
        weights, jnp.asarray(padded), jnp.int32(len(piano_prompt)), jnp.asarray(condition)
    )
    mixed = np.array(logits[0] * 5 / 40 + logits[1] * 35 / 40)
    mixed[ARIA.dim_id] = -np.inf
    first = generate(
        conditioned_model, piano_prompt, condition=condition, guidance=5.0, use_grammar=False
    )[0, 0]
    assert first == mixed.argmax()


def test_repetition_penalty_lowers_repeated_notes(tiny_model, piano_prompt):
    def n_distinct(penalty):
        ids = generate(
            tiny_model, piano_prompt, max_tokens=60,
            repetition=RepetitionPenalty(penalty=penalty, window=60),
        )  # fmt: skip
        return len({i for i in ids[0].tolist() if ARIA.kind[i] == Kind.NOTE})

    assert n_distinct(1e6) == 20 > n_distinct(1.0)


def test_mesh_equals_one_device(random_model, piano_prompt):
    model = random_model(scale=30.0, d_model=32, n_heads=4)
    expected = generate(model, piano_prompt, n=4, max_tokens=24)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    merge, params = split_model(model)
    sharded = merge(
        jax.device_put(params, parameter_shardings(parameter_specs(model.config), mesh))
    )
    assert decoder_weights(sharded).blocks[0]["up"].rows_OxI.sharding.spec == PartitionSpec(
        "tensor", "fsdp"
    )
    ids = generate(sharded, piano_prompt, n=4, max_tokens=24, mesh=mesh)
    np.testing.assert_array_equal(ids, expected)


def test_a_step_writes_into_the_cache_it_was_given(tiny_model):
    weights = decoder_weights(tiny_model)
    _, prompt = jax.eval_shape(
        prefill, weights, jnp.zeros(256, jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    )
    own = empty_cache(weights, 2, 2048)
    step = jax.jit(decode_step, donate_argnums=2)
    memory = (
        step.lower(weights, prompt, own, jnp.zeros(2, jnp.int32), jnp.int32(0))
        .compile()
        .memory_analysis()
    )
    cached = sum(leaf.nbytes for leaf in jax.tree.leaves(own))
    assert memory.alias_size_in_bytes >= cached
    assert memory.temp_size_in_bytes < cached / 4, "a cache is copied"


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_low_precision_is_close(tiny_model, piano_prompt, precision, tolerance):
    """Relative to the spread of the logits: bfloat16 keeps 8 bits, int8 as many per weight."""
    padded = np.full(256, ARIA.pad_id)
    padded[: len(piano_prompt)] = piano_prompt
    exact, low = (
        compiled_prefill(
            decoder_weights(tiny_model, p), jnp.asarray(padded), jnp.int32(len(piano_prompt))
        )[0]
        for p in ("float32", precision)
    )
    assert float(jnp.abs(low - exact).max() / exact.std()) < tolerance * 4
    assert float(jnp.abs(low - exact).mean() / exact.std()) < tolerance
    ids = generate(tiny_model, piano_prompt, precision=precision, max_tokens=12)
    assert ids.shape == (1, 12)


@pytest.mark.skipif(not narrow_cpu.on_cpu(), reason="needs a CPU as default device")
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_the_cpus_product_equals_the_compilers(tiny_model, piano_prompt, precision):
    """Prefill converts whole matrices, decoding rows in registers: the same numbers."""
    weights = decoder_weights(tiny_model, precision)
    assert weights.blocks[0]["up"].on_cpu
    plain = jax.tree.map(
        lambda m: m.replace(on_cpu=False) if isinstance(m, DecodingMatrix) else m,
        weights,
        is_leaf=lambda m: isinstance(m, DecodingMatrix),
    )
    padded = np.full(256, ARIA.pad_id)
    padded[: len(piano_prompt)] = piano_prompt
    logits, narrow = compiled_prefill(weights, jnp.asarray(padded), jnp.int32(len(piano_prompt)))
    expected, exact = compiled_prefill(plain, jnp.asarray(padded), jnp.int32(len(piano_prompt)))
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # logits reach 30

    def step(form, prompt, dtype):
        own = empty_cache(form, 2, 8, dtype=dtype)
        return compiled_step(form, prompt, own, jnp.array([40, 900]), jnp.int32(0))[0]

    expected = step(plain, exact, jnp.float32)
    np.testing.assert_allclose(step(weights, exact, jnp.float32), expected, atol=1e-4)
    of_narrow = step(weights, narrow, weights.cache_dtype)
    assert narrow.layers[0].keys.dtype == weights.cache_dtype
    # Eight bits of every key and value: far less than what narrow weights cost.
    assert float(jnp.abs(of_narrow - expected).max() / expected.std()) < 0.02


def test_int8_rows_are_within_half_a_step():
    rows = jax.random.normal(jax.random.key(0), (3, 64)) * jnp.array([1.0, 10.0, 0.0])[:, None]
    matrix = quantize(rows)
    assert matrix.rows_OxI.dtype == jnp.int8
    restored = jnp.eye(64) @ matrix
    assert (jnp.abs(restored.T - rows) <= matrix.scale_O[:, None] / 2 * 1.0001).all()
    assert (restored[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([6, 0, 1], "<E>"),
        ([6, 0, 1, 6], "<E>"),
        ([6, 0, 99_999], "17726"),
        ([0], "no instrument"),
    ],
)
def test_impossible_prompts(tiny_model, prompt, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_model, np.array(prompt, np.int64))


def test_condition_without_adapter(tiny_model, piano_prompt):
    with pytest.raises(UserError, match="conditioning"):
        generate(tiny_model, piano_prompt, condition=np.zeros(8))


def test_impossible_settings():
    for settings in ({"max_tokens": 0}, {"max_tokens": 130, "force_end": True}, {"guidance": -1}):
        with pytest.raises(UserError):
            Decoding(**settings)
