"""Cross-entropy: of next tokens, without the logits of the whole batch; of classes; of files.

For next tokens, output matrix and softmax are one operation, done for a chunk of tokens at a time.
When gradients are asked for, each chunk's are computed beside its loss, while its logits exist:
nothing is computed twice, and the backward pass only scales (the idea of Liger kernels' fused
linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989).

On a mesh every device takes its tokens and its part of the vocabulary, which is padded until it
divides; padded columns have no probability.

Sizes: B batch, L length, T tokens (B × L), D d_model, V vocabulary, C tokens of one chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from aria_jax.losses import Groups
from aria_jax.sharding import LOGICAL_RULES, active_mesh, divisible_spec, platform
from data_pipeline.errors import UserError, expect_array

CHUNK_TOKENS = 1024
"""Of one device."""
GPU_CHUNK_TOKENS = 4096
"""Of one GPU: each chunk reads and writes the head's float32 gradient, which would take as long as
its products; the logits of so many tokens are 290 MB."""
GPU_COLUMNS = 128
"""Columns of the head on a GPU are a multiple of this: tensor cores read rows of aligned length."""


def loss_chunk(platform: str) -> int:
    """Tokens whose logits exist at once on one device of "cpu", "gpu" or "tpu"."""
    return GPU_CHUNK_TOKENS if platform == "gpu" else CHUNK_TOKENS


def next_token_loss(
    hidden_BxLxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxL: jax.Array,
    loss_mask_BxL: jax.Array | None = None,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    groups: Groups | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean negative log-likelihood in nats over the unmasked targets.

    Args:
        hidden_BxLxD: what the head reads; matrix products are done in its dtype, sums in float32.
        head_DxV: float32 output matrix.
        targets_BxL: int ids; loss_mask_BxL: bool, False leaves a target out; None takes all.
        z_loss: weight of the squared log-normaliser, added to each token's loss.
        chunk_tokens: tokens whose logits exist at once on a device; None suits the device.
        groups: of the rows, to tell their losses apart.

    Returns:
        The loss (float32 scalar), and float32 scalars {"n_tokens": number of targets, "accuracy":
        share of them with the largest logit}; with `groups` also "by_group", {"loss": sum over the
        targets of each group, "weight": number of them}, float32 [groups] both.

    Raises:
        UserError: no arrays, or of shapes that do not fit together.
    """
    *rows, d_model = expect_array(hidden_BxLxD, "next_token_loss: hidden", "B", "L", "d_model")
    width, _ = expect_array(head_DxV, "next_token_loss: the head", "d_model", "vocabulary")
    targets = expect_array(targets_BxL, "next_token_loss: targets", "B", "L")
    if loss_mask_BxL is None:
        loss_mask_BxL = jnp.ones(targets, bool)
    mask = expect_array(loss_mask_BxL, "next_token_loss: the mask", "B", "L")
    if (width, *targets, *mask) != (d_model, *rows, *rows):
        raise UserError(
            f"next_token_loss: hidden {[*rows, d_model]}, head {list(head_DxV.shape)}, targets "
            f"{list(targets)} and mask {list(mask)} do not fit together"
        )
    if chunk_tokens is None:
        chunk_tokens = loss_chunk(platform())
    mask_BxL = loss_mask_BxL.astype(jnp.float32)
    n_tokens = mask_BxL.sum()
    weights = mask_BxL / jnp.maximum(n_tokens, 1)
    if groups is not None:
        of_group = mask_BxL[..., None] * groups.one_hot()[:, None]
        weights = jnp.concatenate([weights[..., None], of_group], -1)
    loss, accuracy = _weighted(hidden_BxLxD, head_DxV, targets_BxL, weights, z_loss, chunk_tokens)
    if groups is None:
        return loss, {"n_tokens": n_tokens, "accuracy": accuracy}
    by_group = {"loss": jax.lax.stop_gradient(loss[1:]), "weight": of_group.sum((0, 1))}
    return loss[0], {"n_tokens": n_tokens, "accuracy": accuracy[0], "by_group": by_group}


def token_nll(
    hidden_TxD: jax.Array, head_DxV: jax.Array, targets_T: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log-normaliser of each token, float32 [T] both."""

    def chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_CxD, targets_C = inputs
        found = _statistics(_head_logits(hidden_CxD, head), targets_C)
        return found.log_z - found.chosen, found.log_z

    head = head_DxV.astype(hidden_TxD.dtype)
    chunks = tuple(_chunked(x, chunk_tokens) for x in (hidden_TxD, targets_T))
    nll, log_z = jax.lax.map(chunk, chunks)
    return nll.reshape(-1)[: len(targets_T)], log_z.reshape(-1)[: len(targets_T)]


class _Part(NamedTuple):
    """Which part of the vocabulary the columns of a head are.

    Attributes:
        size: of the whole vocabulary, without padding.
        axis: mesh axis that the vocabulary is cut over; None for all of it here.
    """

    size: int
    axis: str | None

    def ids(self, width: int) -> jax.Array:
        """Token ids of the columns here, int32 [width]."""
        first = 0 if self.axis is None else jax.lax.axis_index(self.axis) * width
        return first + jnp.arange(width)


class _Statistics(NamedTuple):
    """Of each token: log-normaliser, logit of the target and largest logit, float32 [C]."""

    log_z: jax.Array
    chosen: jax.Array
    largest: jax.Array


def _head_logits(hidden_CxD: jax.Array, head_DxV: jax.Array) -> jax.Array:
    return jnp.matmul(hidden_CxD, head_DxV, preferred_element_type=jnp.float32)


def _statistics(
    logits_CxV: jax.Array, targets_C: jax.Array, part: _Part | None = None
) -> _Statistics:
    largest = logits_CxV.max(-1)
    if part is None or part.axis is None:
        total = jnp.exp(logits_CxV - largest[:, None]).sum(-1)
        chosen = jnp.take_along_axis(logits_CxV, targets_C[:, None], axis=-1)[:, 0]
    else:
        largest = jax.lax.pmax(largest, part.axis)
        total = jnp.exp(logits_CxV - largest[:, None]).sum(-1)
        here = part.ids(logits_CxV.shape[1]) == targets_C[:, None]
        chosen = jnp.where(here, logits_CxV, 0).sum(-1)
        total, chosen = jax.lax.psum((total, chosen), part.axis)
    return _Statistics(largest + jnp.log(total), chosen, largest)


def _chunked(x: jax.Array, chunk_tokens: int) -> jax.Array:
    """[T, ...] as [chunks, C, ...], zero-padded; C is at most `chunk_tokens`."""
    n_chunks = -(-len(x) // chunk_tokens)
    size = -(-len(x) // n_chunks)
    padded = jnp.pad(x, [(0, n_chunks * size - len(x))] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(n_chunks, size, *x.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted(
    hidden_BxLxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    z_loss: float,
    chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over tokens: of the loss, and of whether the target has the largest logit.

    Weights [B, L], or [B, L, N] for N sums of each, of which the first is the loss to learn from.
    """
    arguments = (hidden_BxLxD, head_DxV, targets_BxL, weights_BxL)
    return _over_devices(*arguments, z_loss=z_loss, chunk_tokens=chunk_tokens, gradients=False)[:2]


def _forward(
    hidden_BxLxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    z_loss: float,
    chunk_tokens: int,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    arguments = (hidden_BxLxD, head_DxV, targets_BxL, weights_BxL)
    loss, accuracy, d_hidden, d_head = _over_devices(
        *arguments, z_loss=z_loss, chunk_tokens=chunk_tokens, gradients=True
    )
    return (loss, accuracy), (d_hidden, d_head.astype(head_DxV.dtype))


def _backward(
    z_loss: float,
    chunk_tokens: int,
    residuals: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_head = residuals
    d_loss = cotangents[0].reshape(-1)[0]
    return (d_hidden * d_loss).astype(d_hidden.dtype), d_head * d_loss, None, None


_weighted.defvjp(_forward, _backward)


def _over_devices(
    hidden_BxLxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    **options: Any,
) -> tuple[Any, ...]:
    """`_on_one_device` on every device's tokens and vocabulary, summed."""
    vocab_size = head_DxV.shape[1]
    head_DxV = head_DxV.astype(hidden_BxLxD.dtype)
    mesh, cut = active_mesh(), str(LOGICAL_RULES["vocab"])
    multiple = GPU_COLUMNS if platform() == "gpu" else 1
    multiple *= 1 if mesh is None else mesh.shape[cut]
    head_DxV = jnp.pad(head_DxV, ((0, 0), (0, -vocab_size % multiple)))
    if mesh is None:
        part = _Part(vocab_size, None)
        out = _on_one_device(
            hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, part=part, over=(), **options
        )
        return (*out[:3], out[3][:, :vocab_size]) if options["gradients"] else out
    rows = divisible_spec(mesh, ("batch", "length"), targets_BxL.shape)
    over = tuple(
        axis
        for entry in rows
        if entry is not None
        for axis in ((entry,) if isinstance(entry, str) else entry)
    )
    whole, of_hidden, of_head = (
        PartitionSpec(),
        PartitionSpec(*rows, None),
        PartitionSpec(None, cut),
    )
    here: Callable = partial(_on_one_device, part=_Part(vocab_size, cut), over=over, **options)
    out = jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(of_hidden, of_head, rows, rows),
        out_specs=(whole, whole, of_hidden, of_head) if options["gradients"] else (whole, whole),
        check_vma=False,
    )(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL)
    return (*out[:3], out[3][:, :vocab_size]) if options["gradients"] else out


def _on_one_device(
    hidden_BxLxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    *,
    part: _Part,
    over: tuple[str, ...],
    z_loss: float,
    chunk_tokens: int,
    gradients: bool,
) -> tuple[Any, ...]:
    """(loss, accuracy), and with `gradients` (..., d_hidden, d_head); `over` are the axes that the
    tokens are cut over.
    """
    d, width = head_DxV.shape
    ids_V = part.ids(width)

    def chunk(d_head_DxV: Any, inputs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        hidden_CxD, targets_C, weights_C = inputs
        logits = _head_logits(hidden_CxD, head_DxV)
        if part.axis is not None or width > part.size:
            logits = jnp.where(ids_V < part.size, logits, -jnp.inf)
        found = _statistics(logits, targets_C, part)
        loss_C = found.log_z - found.chosen + z_loss * jnp.square(found.log_z)
        sums = jnp.stack([loss_C, found.chosen >= found.largest]) @ weights_C
        if not gradients:
            return None, (sums, None)
        p_CxV = jnp.exp(logits - found.log_z[:, None])
        if weights_C.ndim == 2:
            weights_C = weights_C[:, 0]
        scale_C = weights_C * (1 + 2 * z_loss * found.log_z)
        target_CxV = jnp.where(ids_V == targets_C[:, None], weights_C[:, None], 0)
        d_logits = (p_CxV * scale_C[:, None] - target_CxV).astype(hidden_CxD.dtype)
        d_head_DxV += jnp.matmul(hidden_CxD.T, d_logits, preferred_element_type=jnp.float32)
        return d_head_DxV, (sums, d_logits @ head_DxV.T)

    chunks = tuple(
        _chunked(x, chunk_tokens)
        for x in (
            hidden_BxLxD.reshape(-1, d),
            targets_BxL.reshape(-1),
            weights_BxL.reshape(-1, *weights_BxL.shape[2:]),
        )
    )
    first = jnp.zeros(head_DxV.shape, jnp.float32) if gradients else None
    d_head_DxV, (sums, d_hidden) = jax.lax.scan(chunk, first, chunks)
    loss, accuracy = jax.lax.psum(sums.sum(0), over)
    if not gradients:
        return loss, accuracy
    d_hidden = d_hidden.reshape(-1, d)[: targets_BxL.size].reshape(hidden_BxLxD.shape)
    if part.axis is not None:
        d_hidden = jax.lax.psum(d_hidden, part.axis)
    return loss, accuracy, d_hidden, jax.lax.psum(d_head_DxV, over)


def classification_loss(
    logits_BxC: jax.Array,
    labels_B: jax.Array,
    mask_B: jax.Array | None = None,
    groups: Groups | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy in nats, and {"accuracy": share with the largest logit}; float32 scalars.

    Args:
        labels_B: int class ids.
        mask_B: bool; rows of False count for nothing (the padding of a last batch).
        groups: of the rows; adds "by_group", see `next_token_loss`.
    """
    logits_BxC = logits_BxC.astype(jnp.float32)
    used_B = jnp.ones(len(labels_B)) if mask_B is None else mask_B.astype(jnp.float32)
    weights_B = used_B / jnp.maximum(used_B.sum(), 1)
    chosen_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BxC), labels_B[:, None], axis=-1)[:, 0]
    correct_B = logits_BxC.argmax(-1) == labels_B
    by_group = {} if groups is None else {"by_group": groups.sums(-chosen_B, used_B)}
    return -(chosen_B @ weights_B), {"accuracy": correct_B @ weights_B, **by_group}


def file_probabilities(
    probabilities_SxC: np.ndarray, n_tokens_S: np.ndarray, piece_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the slices of each file, weighted by their tokens (reference:
    classifier_finetune.py val_loop).

    Args:
        probabilities_SxC: of each slice.
        n_tokens_S: tokens of each slice, padding not counted.
        piece_S: file of each slice; negative in padding rows, which are left out.

    Returns:
        Files in ascending order, int [F], and their probabilities, float64 [F, C].
    """
    used = (piece_S >= 0) & (n_tokens_S > 0)
    pieces, of_slice = np.unique(piece_S[used], return_inverse=True)
    weights = n_tokens_S[used].astype(np.float64)
    total = np.zeros((len(pieces), probabilities_SxC.shape[1]))
    np.add.at(total, of_slice, weights[:, None] * probabilities_SxC[used])
    return pieces, total / np.bincount(of_slice, weights, len(pieces))[:, None]
