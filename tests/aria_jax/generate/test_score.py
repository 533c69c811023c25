"""Scores equal the reference's; windows see enough; notes add up."""

import jax
import numpy as np
import pytest

from aria_jax.generate.score import score_pieces, windows
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer

ARIA = Tokenizer.preset("aria")


def test_equals_the_reference(golden, golden_model):
    with np.load(golden / "model" / "io.npz") as arrays:
        ids, expected = arrays["ids"], arrays["lm_nll_per_token"]
    scores = score_pieces(golden_model("lm"), ARIA, list(ids))
    np.testing.assert_allclose([score.nll for score in scores], expected, rtol=1e-5)


def test_batches_equal_one_at_a_time(tiny_model, monkeypatch):
    monkeypatch.setattr("aria_jax.generate.score.BATCH_TOKENS", 256)
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, ARIA.vocab_size, n) for n in (2, 200, 129, 130, 40)]
    together = score_pieces(tiny_model, ARIA, pieces)
    for piece, score in zip(pieces, together, strict=True):
        logits = tiny_model(piece[None, :-1])[0]
        expected = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(piece) - 1), piece[1:]]
        np.testing.assert_allclose(score.nll, expected, atol=1e-4)  # values reach 100
        assert score.mean_nll == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize("n_inputs", [1, 7, 8, 9, 12, 13, 40, 41])
def test_windows_cover_every_token_once_with_half_the_context(n_inputs):
    kept = []
    for w in windows(0, n_inputs, 8):
        assert w.stop - w.start <= 8
        assert w.keep == w.start or w.keep - w.start >= 4
        kept += range(w.keep, w.stop)
    assert kept == list(range(n_inputs))


def test_beyond_the_context_each_window_starts_afresh(tiny_model):
    piece = np.random.default_rng(1).integers(0, ARIA.vocab_size, 61)
    (score,) = score_pieces(tiny_model, ARIA, [piece], context=40)
    (first,) = score_pieces(tiny_model, ARIA, [piece[:41]])
    (second,) = score_pieces(tiny_model, ARIA, [piece[20:61]])
    np.testing.assert_allclose(score.nll[:40], first.nll, atol=1e-4)
    np.testing.assert_allclose(score.nll[40:], second.nll[20:], atol=1e-4)


def test_notes_add_up_their_tokens(tiny_model, piano_prompt):
    drum = [ARIA.id_of(("drum", 40)), ARIA.id_of(("onset", 600))]
    piece = np.concatenate([piano_prompt, [ARIA.time_id], drum, [ARIA.eos_id]])
    (score,) = score_pieces(tiny_model, ARIA, [piece])
    assert [(n["onset_ms"], n["pitch"]) for n in score.notes] == [(0, 60), (480, 64), (5600, 40)]
    assert [n["instrument"] for n in score.notes] == ["piano", "piano", "drum"]
    parts = (slice(1, 4), slice(4, 7), slice(8, 10))
    np.testing.assert_allclose(
        [n["nll"] for n in score.notes], [score.nll[part].sum() for part in parts], rtol=1e-6
    )
    piano, drum = (score.by_instrument[name] for name in ("piano", "drum"))
    assert (piano["n_notes"], drum["n_notes"]) == (2, 1)
    np.testing.assert_allclose(piano["nats_per_note"], score.nll[1:7].sum() / 2, rtol=1e-6)


def test_mistakes(tiny_model):
    for piece in ([6], [6, 99_999], [6, -1]):
        with pytest.raises(UserError):
            score_pieces(tiny_model, ARIA, [np.array(piece)])
    with pytest.raises(UserError, match="context"):
        score_pieces(tiny_model, ARIA, [np.array([6, 0])], context=1)
