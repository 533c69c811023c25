"""Next-token cross-entropy that never holds the logits of the whole batch.

Sizes: T tokens (batch × length), D d_model, V vocabulary, C tokens of one chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 1024


def next_token_loss(
    hidden_BxLxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxL: jax.Array,
    loss_mask_BxL: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood in nats over the unmasked targets.

    Args:
        hidden_BxLxD: what the head reads.
        head_DxV: float32 output matrix.
        targets_BxL: int ids; loss_mask_BxL: bool, False leaves a target out.
        z_loss: weight of the squared log-normaliser, added to each token's loss.

    Returns:
        The loss (float32 scalar), and {"n_tokens": float32, number of targets}.
    """
    d = hidden_BxLxD.shape[-1]
    weights_T = loss_mask_BxL.reshape(-1).astype(jnp.float32)
    n_tokens = weights_T.sum()
    nll_T, log_z_T = token_nll(
        hidden_BxLxD.reshape(-1, d), head_DxV, targets_BxL.reshape(-1), chunk_tokens
    )
    per_token = nll_T + z_loss * jnp.square(log_z_T) if z_loss else nll_T
    loss = (per_token * weights_T).sum() / jnp.maximum(n_tokens, 1)
    return loss, {"n_tokens": n_tokens}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_nll(
    hidden_TxD: jax.Array, head_DxV: jax.Array, targets_T: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log-normaliser of each token, float32 [T] both.

    Logits exist for `chunk_tokens` tokens at a time, forward and backward.
    """
    return _forward(hidden_TxD, head_DxV, targets_T, chunk_tokens)[0]


def _chunked(x: jax.Array, chunk_tokens: int) -> jax.Array:
    """[T, ...] as [T / C, C, ...], zero-padded."""
    padded = jnp.pad(x, [(0, -len(x) % chunk_tokens)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, chunk_tokens, *x.shape[1:])


def _logits(hidden_CxD: jax.Array, head_DxV: jax.Array) -> jax.Array:
    return jnp.matmul(
        hidden_CxD, head_DxV.astype(hidden_CxD.dtype), preferred_element_type=jnp.float32
    )


def _forward(hidden_TxD, head_DxV, targets_T, chunk_tokens):
    n = len(targets_T)
    chunk_tokens = min(chunk_tokens, n)

    def chunk(_, inputs):
        hidden_CxD, targets_C = inputs
        logits = _logits(hidden_CxD, head_DxV)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets_C[:, None], axis=-1)[:, 0]
        return None, (log_z - chosen, log_z)

    inputs = _chunked(hidden_TxD, chunk_tokens), _chunked(targets_T, chunk_tokens)
    _, (nll, log_z) = jax.lax.scan(chunk, None, inputs)
    nll_T, log_z_T = nll.reshape(-1)[:n], log_z.reshape(-1)[:n]
    return (nll_T, log_z_T), (hidden_TxD, head_DxV, targets_T, log_z_T)


def _backward(chunk_tokens, residuals, cotangents):
    hidden_TxD, head_DxV, targets_T, log_z_T = residuals
    d_nll_T, d_log_z_T = cotangents
    n = len(targets_T)
    chunk_tokens = min(chunk_tokens, n)

    def chunk(d_head_DxV, inputs):
        hidden_CxD, targets_C, log_z_C, d_nll_C, d_log_z_C = inputs
        p_CxV = jnp.exp(_logits(hidden_CxD, head_DxV) - log_z_C[:, None])
        d_logits = p_CxV * (d_nll_C + d_log_z_C)[:, None]
        d_logits = d_logits.at[jnp.arange(chunk_tokens), targets_C].add(-d_nll_C)
        d_logits = d_logits.astype(hidden_CxD.dtype)
        d_hidden = d_logits @ head_DxV.astype(hidden_CxD.dtype).T
        d_head_DxV += jnp.matmul(hidden_CxD.T, d_logits, preferred_element_type=jnp.float32)
        return d_head_DxV, d_hidden

    inputs = tuple(
        _chunked(x, chunk_tokens) for x in (hidden_TxD, targets_T, log_z_T, d_nll_T, d_log_z_T)
    )
    d_head_DxV, d_hidden = jax.lax.scan(chunk, jnp.zeros(head_DxV.shape, jnp.float32), inputs)
    d_hidden_TxD = d_hidden.reshape(-1, hidden_TxD.shape[-1])[:n]
    return d_hidden_TxD, d_head_DxV.astype(head_DxV.dtype), None


token_nll.defvjp(_forward, _backward)
