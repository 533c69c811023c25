"""A sliding context equals reading the kept events again, and nothing it generates is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.generate.continuation import Continuation, continue_prompt
from aria_jax.generate.decoding import Decoding, decode, slide
from aria_jax.generate.grammar import make_grammar, state_after
from aria_jax.generate.sampler import Greedy, MinP
from aria_jax.generate.weights import decoder_weights
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind

ARIA = Tokenizer.preset("aria")
CONTEXT = 64


def generate(model, prompt, *, n=1, seed=0, condition=None, **kw):
    *_, ids = decode(
        decoder_weights(model),
        ARIA,
        prompt,
        n_sequences=n,
        key=jax.random.key(seed),
        settings=Decoding(**({"max_tokens": 120, "sliding": True, "sampler": MinP()} | kw)),
        condition_E=condition,
    )
    return ids


def recomputed(model, prompt, n_tokens):
    """Greedy tokens, each from the network run anew over what the context then holds."""
    graph, state = nnx.split(model)
    logits_of = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids[None])[0])
    grammar, half = make_grammar(ARIA, prompt), CONTEXT // 2
    ids, seen = prompt, prompt
    n_full = CONTEXT - len(prompt) - 1
    for n in range(n_tokens):
        if n == n_full:
            seen, n_full = slide(ARIA, ids, half), n + CONTEXT - half - 1
        padded = np.pad(seen, (0, CONTEXT - len(seen)), constant_values=ARIA.pad_id)
        logits = logits_of(state, jnp.asarray(padded))[len(seen) - 1]
        allowed = grammar.allowed(state_after(ARIA, ids, 1), n_tokens - n)[0]
        token = int(jnp.where(allowed, logits, -jnp.inf).argmax())
        if token == ARIA.eos_id:
            return [*ids[len(prompt) :].tolist(), token]
        ids, seen = np.append(ids, token), np.append(seen, token)
    return ids[len(prompt) :].tolist()


def test_equals_recomputation(random_model, piano_prompt):
    """120 tokens behind 8 slide a context of 64 three times."""
    model = random_model(seed=2, scale=30.0, max_seq_len=CONTEXT, n_layers=1)
    expected = recomputed(model, piano_prompt, 120)
    assert len(expected) == 120
    assert generate(model, piano_prompt, sampler=Greedy())[0].tolist() == expected


@pytest.mark.slow
def test_variations_depend_on_seed_and_number_alone(random_model, piano_prompt):
    model = random_model(scale=30.0, max_seq_len=CONTEXT, n_layers=1)
    three = generate(model, piano_prompt, n=3)
    one = generate(model, piano_prompt, n=1)
    np.testing.assert_array_equal(three[0, : one.shape[1]], one[0])
    assert (three[0] != three[1]).any()
    np.testing.assert_array_equal(generate(model, piano_prompt, n=3), three)
    weights = decoder_weights(model)
    found = continue_prompt(
        weights, ARIA, piano_prompt, n=3, seed=0, settings=Decoding(max_tokens=120, sliding=True)
    )
    for continuation in found:
        if not continuation.ended:
            assert len(continuation.ids) == 120
        whole = Continuation(piano_prompt, continuation.ids, ARIA).full
        assert len(whole.notes) == 2 + ARIA.n_notes(continuation.ids)


def test_the_same_until_the_context_is_full(random_model, piano_prompt):
    model = random_model(scale=30.0, max_seq_len=CONTEXT, n_layers=1)
    room = CONTEXT - len(piano_prompt) - 1
    fixed = generate(model, piano_prompt, sliding=False, sampler=Greedy(), use_grammar=False,
                     max_tokens=room)  # fmt: skip
    sliding = generate(model, piano_prompt, sampler=Greedy(), use_grammar=False)
    assert sliding.shape[1] > room
    np.testing.assert_array_equal(sliding[:, :room], fixed)


def test_a_condition_is_kept(random_model, piano_prompt):
    model = random_model(seed=1, scale=30.0, max_seq_len=CONTEXT, n_layers=1, emb_size=8)
    condition = np.linspace(-3, 3, 8)
    plain = generate(model, piano_prompt, sampler=Greedy())
    zero = generate(model, piano_prompt, sampler=Greedy(), condition=condition, guidance=0.0)
    # Guidance 0 is the model without the condition, after each slide too; `<D>` is never chosen.
    if ARIA.dim_id not in plain:
        np.testing.assert_array_equal(zero, plain)
    strong = generate(model, piano_prompt, sampler=Greedy(), condition=condition, guidance=5.0)
    assert (strong[:, -50:] != plain[:, -50:]).any()


def test_a_prompt_longer_than_the_context(random_model, piano_prompt):
    model = random_model(scale=30.0, max_seq_len=CONTEXT, n_layers=1)
    prompt = np.concatenate([piano_prompt, np.tile(piano_prompt[2:], 20)])
    with pytest.raises(UserError, match="--sliding"):
        continue_prompt(decoder_weights(model), ARIA, prompt, n=1, seed=0, settings=Decoding())
    ids = generate(model, prompt, sampler=Greedy(), max_tokens=20)
    again = generate(model, slide(ARIA, prompt, CONTEXT // 2), sampler=Greedy(), max_tokens=20)
    np.testing.assert_array_equal(ids, again)


NOTES = st.lists(st.tuples(st.integers(0, 400), st.integers(21, 108)), min_size=1, max_size=60)


@given(NOTES, st.integers(12, 100), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_slide_keeps_whole_young_events_in_their_places(notes, max_tokens, partial):
    """What is left decodes to the last notes, each as long after the first as it was."""
    ids, at_ms, segment = [ARIA.id_of(("prefix", "instrument", "piano")), ARIA.bos_id], 0, 0
    for step, pitch in notes:
        at_ms += step * 10
        while at_ms // 5000 > segment:
            ids.append(ARIA.time_id)
            segment += 1
        ids += [
            ARIA.id_of(("piano", pitch, 70)),
            ARIA.id_of(("onset", at_ms % 5000)),
            ARIA.id_of(("dur", 300)),
        ]
    ids = np.array(ids[: len(ids) - partial], np.int64)
    kept = slide(ARIA, ids, max_tokens)
    assert len(kept) <= max(max_tokens, min(len(ids), max_tokens))
    assert kept[:2].tolist() == ids[:2].tolist()
    assert kept[2:].tolist() == ids[len(ids) - len(kept) + 2 :].tolist()
    if len(kept) < len(ids):
        assert ARIA.kind[kept[2]] not in (Kind.ONSET, Kind.DUR)
    before, after = ARIA.decode(ids).notes, ARIA.decode(kept).notes
    last = before[len(before) - len(after) :]
    assert after["pitch"].tolist() == last["pitch"].tolist()
    shift = last["start"] - after["start"]
    assert (shift == shift[:1]).all() and (shift % 5000 == 0).all()


def test_a_diverged_model_says_so(random_model, piano_prompt):
    model = random_model(n_layers=1)
    model.head[...] = model.head[...].at[0, 100].set(jnp.nan)
    for use_grammar in (True, False):
        with pytest.raises(UserError, match="not finite"):
            generate(model, piano_prompt, use_grammar=use_grammar)
    # Not only where the prompt is read: an embedding that overflows is met on the way.
    model = random_model(n_layers=1)
    weights = decoder_weights(model)
    weights = dataclasses.replace(
        weights, embedding_VxD=weights.embedding_VxD.at[ARIA.first_note_id :].set(jnp.inf)
    )
    with pytest.raises(UserError, match="after 3 tokens"):
        list(decode(weights, ARIA, piano_prompt[:2], n_sequences=1, key=jax.random.key(0),
                    settings=Decoding(max_tokens=40, chunk=10)))  # fmt: skip
