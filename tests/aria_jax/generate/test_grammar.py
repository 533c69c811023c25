"""The automaton accepts what the tokenizer writes and makes only what the tokenizer reads."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.generate.grammar import Expect, grammar_after, make_grammar, state_after
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind
from tests.corpora import random_performance

ARIA = Tokenizer.preset("aria")


def ids(tokenizer, *tokens):
    return np.array([tokenizer.id_of(token) for token in tokens])


def piano(tokenizer=ARIA):
    return ids(tokenizer, ("prefix", "instrument", "piano"), "<S>")


def may_follow(prompt, tokenizer=ARIA, remaining=100):
    grammar = make_grammar(tokenizer, prompt)
    mask = grammar.allowed(state_after(tokenizer, prompt, 1), remaining)[0]
    return {tokenizer.tokens[i] for i in np.flatnonzero(mask)}


def read_strictly(tokenizer, body):
    """Reads events as the detokeniser must; returns their number, fails on any stray token."""
    n_events, at, onset, dims = 0, 0, 0, 0
    while at < len(body):
        kind = Kind(tokenizer.kind[body[at]])
        if kind in (Kind.NOTE, Kind.DRUM, Kind.PEDAL):
            length = 3 if kind == Kind.NOTE else 2
            kinds = [Kind(k) for k in tokenizer.kind[body[at : at + length]]]
            assert kinds[1:] == [Kind.ONSET, Kind.DUR][: length - 1]
            assert tokenizer.onset_ms[body[at + 1]] >= onset
            onset = tokenizer.onset_ms[body[at + 1]]
            assert length == 2 or tokenizer.dur_ms[body[at + 2]] > 0
            n_events += 1
            at += length
        else:
            assert body[at] in (tokenizer.time_id, tokenizer.dim_id, tokenizer.eos_id)
            onset = 0 if body[at] == tokenizer.time_id else onset
            dims += body[at] == tokenizer.dim_id
            if body[at] == tokenizer.eos_id:
                assert (body[at + 1 :] == tokenizer.pad_id).all()
                break
            at += 1
    assert dims <= 1
    return n_events


@partial(jax.jit, static_argnames=("length", "batch"))
def random_walk(grammar, state, key, bias_V, *, length, batch):
    def step(state, t):
        mask = grammar.allowed(state, length - t)
        noise = 3 * jax.random.normal(jax.random.fold_in(key, t), (batch, mask.shape[1]))
        token = jnp.argmax(jnp.where(mask, noise + bias_V, -jnp.inf), -1)
        return grammar.advance(state, token), token

    return jax.lax.scan(step, state, jnp.arange(length))[1].T


@pytest.mark.parametrize(
    ("preset", "instruments"),
    [("aria", ["piano"]), ("aria", ["organ", "drum"]), ("pedal", ["piano"])],
)
def test_any_walk_decodes_without_loss(preset, instruments):
    tokenizer = Tokenizer.preset(preset)
    prompt = ids(tokenizer, *[("prefix", "instrument", name) for name in instruments], "<S>")
    # Rare classes are made likely, so that every transition is walked.
    bias = 8.0 * np.isin(tokenizer.kind, (Kind.SPECIAL, Kind.TIME, Kind.DRUM, Kind.PEDAL))
    bias[tokenizer.eos_id] = 4.0
    batch, length = 24, 50
    walks = random_walk(
        make_grammar(tokenizer, prompt),
        state_after(tokenizer, prompt, batch),
        jax.random.key(3, impl="unsafe_rbg"),  # 21 million draws
        jnp.asarray(bias),
        length=length,
        batch=batch,
    )
    n_ended = 0
    for walk in np.asarray(walks):
        n_events = read_strictly(tokenizer, walk)
        whole = np.concatenate([prompt, walk])
        decoded = tokenizer.decode(whole)
        assert len(decoded.notes) + len(decoded.pedals) == n_events
        assert len(np.unique(decoded.notes[["start", "channel", "pitch"]])) == len(decoded.notes)
        assert len(decoded.notes) == tokenizer.n_notes(whole)
        n_ended += tokenizer.eos_id in walk
    assert 0 < n_ended < batch


def doubled(body):
    """Places of onsets at which a key sounds that was struck at that very moment.

    Only tracks merged into one piano have them; no MIDI file of one channel can.
    """
    struck, found = set(), []
    for i, token in enumerate(body):
        if token == ARIA.time_id:
            struck.clear()
        elif ARIA.kind[token] == Kind.ONSET:
            key = (*ARIA.tokens[body[i - 1]][:2], int(token))
            if key in struck:
                found.append(i)
            struck.add(key)
    return found


def test_every_real_piece_is_grammatical(golden):
    for path in sorted((golden / "tokenizer").glob("*.json"))[::8]:
        piece = json.loads(path.read_text())
        prefix, body = np.array(piece["prefix_ids"]), np.array(piece["body_ids"][:3000])
        prompt = np.append(prefix, body[0])
        grammar = make_grammar(ARIA, prompt)

        @jax.jit
        def accepts(grammar, state, body):
            def step(state, token):
                good = grammar.allowed(state, 10_000)[0, token]
                return grammar.advance(state, token[None]), good

            return jax.lax.scan(step, state, body)[1]

        good = np.asarray(accepts(grammar, state_after(ARIA, prompt, 1), jnp.asarray(body[1:])))
        assert np.flatnonzero(~good).tolist() == doubled(body[1:]), path.name
        assert good.all() or path.name.startswith(("multitrack", "band", "two_hands"))


def test_after_a_note_only_its_onset_and_duration_follow():
    note = ids(ARIA, ("piano", 60, 70))
    onset = ids(ARIA, ("onset", 4980))
    assert may_follow(np.concatenate([piano(), note])) == {
        ("onset", ms) for ms in range(0, 5000, 10)
    }
    assert may_follow(np.concatenate([piano(), note, onset])) == {
        ("dur", ms) for ms in range(10, 5001, 10)
    }
    again = np.concatenate([piano(), note, onset, ids(ARIA, ("dur", 10), ("piano", 61, 70))])
    assert may_follow(again) == {("onset", 4980), ("onset", 4990)}


def test_no_key_is_struck_twice_at_once():
    chord = ids(ARIA, ("piano", 60, 70), ("onset", 4980), ("dur", 10))
    softer = ids(ARIA, ("piano", 60, 20))
    assert may_follow(np.concatenate([piano(), chord, softer])) == {("onset", 4990)}
    last = ids(ARIA, ("onset", 4990), ("dur", 10))
    full = np.concatenate([piano(), chord, softer, last])
    # No later onset is left in this segment; the next one begins anew.
    assert ("piano", 60, 70) not in may_follow(full) and ("piano", 61, 70) in may_follow(full)
    new = np.concatenate([full, ids(ARIA, "<T>", ("piano", 60, 70))])
    assert ("onset", 0) in may_follow(new)


def test_between_events():
    follow = may_follow(piano())
    assert {"<T>", "<D>", "<E>", ("piano", 60, 70)} <= follow
    assert not {"<S>", "<P>", "<U>", ("piano", 60, 0), ("organ", 60, 70), ("drum", 40)} & follow
    assert not any(token[0] in ("prefix", "onset", "dur") for token in follow)


def test_counts_and_space():
    assert may_follow(piano(), remaining=2) == {"<T>", "<D>", "<E>"}
    assert "<T>" not in may_follow(np.concatenate([piano(), ids(ARIA, *["<T>"] * 12)]))
    assert "<D>" not in may_follow(np.concatenate([piano(), ids(ARIA, "<D>")]))
    assert may_follow(np.concatenate([piano(), ids(ARIA, "<E>")])) == {"<P>"}


def test_time_token_begins_a_new_segment():
    prompt = np.concatenate(
        [
            piano(),
            ids(ARIA, ("piano", 60, 70), ("onset", 4000), ("dur", 10), "<T>", ("piano", 60, 70)),
        ]
    )
    assert ("onset", 0) in may_follow(prompt)


def test_scanning_a_prompt_equals_advancing_through_it():
    tokenizer = Tokenizer.preset("pedal")
    body = ids(
        tokenizer, ("piano", 60, 70), ("onset", 400), ("dur", 10), "<PED_ON>", ("onset", 900),
        "<T>", "<T>", "<D>", ("piano", 2, 70), ("onset", 10), ("dur", 30), "<E>",
    )  # fmt: skip
    prompt = piano(tokenizer)
    grammar, state = make_grammar(tokenizer, prompt), state_after(tokenizer, prompt, 2)
    for n, token in enumerate(body):
        state = grammar.advance(state, jnp.array([token, token]))
        scanned = state_after(tokenizer, np.concatenate([prompt, body[: n + 1]]), 2)
        jax.tree.map(np.testing.assert_array_equal, state, scanned)
    assert state.expect_B.tolist() == [Expect.END] * 2


def test_a_prompt_without_instrument_is_refused():
    with pytest.raises(UserError, match="announces no instrument"):
        make_grammar(ARIA, ids(ARIA, "<S>"))


@pytest.mark.parametrize("scheme", ["musenet", "piano-roll", "remi", "midi-like"])
def test_other_schemes_are_generated_by_their_own_tables(scheme):
    if scheme in ("remi", "midi-like"):
        pytest.importorskip("miditok")
    tokenizer, rng = Tokenizer.preset(scheme), np.random.default_rng(0)
    prompt = tokenizer.encode(random_performance(rng, 5), add_eos=False).astype(int)
    grammar, state = grammar_after(tokenizer, prompt, 8)
    made = np.zeros((8, 0), int)
    for _ in range(60):
        allowed = np.asarray(grammar.allowed(state, 100))
        assert allowed.any(1).all()
        token = np.array([rng.choice(np.flatnonzero(row)) for row in allowed])
        state = grammar.advance(state, jnp.asarray(token))
        made = np.concatenate([made, token[:, None]], axis=1)
    automaton, n_ended = tokenizer.grammar(), 0
    for row in made:
        ended = np.flatnonzero(row == tokenizer.eos_id)
        body = row[: ended[0] + 1] if len(ended) else row
        n_ended += len(ended)
        assert automaton.first_error(np.concatenate([prompt, body])) == -1
        assert (row[len(body) :] == tokenizer.pad_id).all()
    with pytest.raises(UserError, match="token 1 of the prompt"):
        grammar_after(tokenizer, prompt[[0, 0]], 1)
