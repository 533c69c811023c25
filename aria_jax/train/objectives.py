"""What each task learns: the loss of a batch, whole or in parts, and of the corpora in it; and how
files are judged by their slices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.config import ContrastiveConfig, RunConfig
from aria_jax.losses import Groups
from aria_jax.losses.contrastive import contrastive_loss
from aria_jax.losses.cross_entropy import classification_loss, file_probabilities, next_token_loss
from aria_jax.models.heads import Model
from aria_jax.models.transformer import token_rows

Batch = dict[str, Any]
Aux = dict[str, Any]
LossFunction = Callable[[Model, Batch, jax.Array | None], tuple[jax.Array, Aux]]

Predictions = Callable[[Model, Batch], dict[str, jax.Array]]

MIN_TEMPERATURE = 0.01
"""Of a learned one: below, single pairs rule the gradient (CLIP, arXiv 2103.00020, section 2.5)."""


@dataclass(frozen=True)
class BatchLoss:
    """A loss that compares all rows of a batch, however many passes embed them: a `LossFunction`.

    The training step differentiates it by gradient caching where there are several parts.

    Attributes:
        embed: (model, rows, dropout key or None) -> embeddings [b, ...].
        compare: (model, embeddings [B, ...], batch) -> (loss, aux).
        parts: passes to embed a batch in.
    """

    embed: Callable[[Model, Batch, jax.Array | None], jax.Array]
    compare: Callable[[Model, jax.Array, Batch], tuple[jax.Array, Aux]]
    parts: int = 1

    def __call__(self, model: Model, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        """The loss, with activations of one part at a time where no gradient is taken."""
        if self.parts == 1:
            return self.compare(model, self.embed(model, batch, key), batch)
        keys = None if key is None else jax.random.split(key, self.parts)
        rows = split_microbatches(batch, self.parts)
        z = jax.lax.map(lambda part: self.embed(model, *part), (rows, keys))
        return self.compare(model, join_microbatches(z), batch)


def split_microbatches(batch: Batch, parts: int) -> Batch:
    """Row i of [B, ...] as row i // parts of part i % parts, [parts, B / parts, ...].

    So each part stays spread over the mesh.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def join_microbatches(parts: jax.Array) -> jax.Array:
    """The inverse of `split_microbatches`."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])


def loss_function(
    config: RunConfig, mesh: jax.sharding.Mesh | None = None, n_sources: int = 1
) -> LossFunction:
    """The loss of `config.task`; contrastive negatives travel round the devices of `mesh`.

    The same function for the same settings: runs of one process that compute the same thing
    compile it once.
    """
    train = config.train
    if config.task == "contrastive":
        start = (train.temperature, config.model.learned_temperature)
        return _contrastive(
            config.contrastive, train.pooling, *start, train.grad_accumulation, mesh, n_sources
        )
    if config.task == "classify":
        return _classify(train.pooling, n_sources)
    return _language_model(config.data.packing == "best-fit", train.z_loss, n_sources)


def _groups(batch: Batch, n_sources: int) -> Groups | None:
    """The corpora of a mixture's rows."""
    return Groups(batch["source"], n_sources) if "source" in batch else None


def _with_tokens(aux: dict[str, Any], groups: Groups | None, n_tokens_B: jax.Array) -> Aux:
    """What a loss says of each group as what it says of each source, with the tokens seen."""
    if groups is None:
        return aux
    by_source = aux.pop("by_group")
    n_tokens = n_tokens_B.astype(jnp.float32) @ groups.one_hot()
    return {**aux, "by_source": {**by_source, "n_tokens": n_tokens}}


@lru_cache(maxsize=8)
def _language_model(packed: bool, z_loss: float, n_sources: int) -> LossFunction:
    def loss(model: Model, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        hidden = model.hidden(
            batch["inputs"],
            positions=batch["positions"] if packed else None,
            segment_ids=batch["segment_ids"] if packed else None,
            dropout_key=key,
        )
        if (head := model.head) is None:
            raise ValueError("next tokens need a model with a head")
        groups = _groups(batch, n_sources)
        value, aux = next_token_loss(
            hidden,
            head[...],
            token_rows(model.config, batch["targets"]),
            batch["loss_mask"],
            z_loss=z_loss,
            groups=groups,
        )
        aux = _with_tokens(aux, groups, batch["loss_mask"].sum(1))
        return value, {**aux, "weight": aux["n_tokens"]}

    return loss


@lru_cache(maxsize=8)
def _contrastive(
    settings: ContrastiveConfig,
    pooling: str,
    temperature: float,
    learned: bool,
    parts: int,
    mesh: jax.sharding.Mesh | None,
    n_sources: int,
) -> BatchLoss:
    def embed(model: Model, batch: Batch, key: jax.Array | None) -> jax.Array:
        tokens_Bx2xL, eos_Bx2 = batch["tokens"], batch["eos"]
        flat = tokens_Bx2xL.reshape(-1, tokens_Bx2xL.shape[-1])
        z = model.pooled(flat, eos_Bx2.reshape(-1), pooling, dropout_key=key)
        return z.reshape(len(eos_Bx2), 2, -1)

    def compare(model: Model, z_Bx2xE: jax.Array, batch: Batch) -> tuple[jax.Array, Aux]:
        composition_B, n_rows = batch["composition"], len(z_Bx2xE)
        ids_B = composition_B
        if not settings.mask_composition:
            ids_B = jnp.where(composition_B < 0, composition_B, jnp.arange(n_rows))
        scale = _temperature(temperature, model)
        groups = _groups(batch, n_sources)
        value, aux = contrastive_loss(
            z_Bx2xE[:, 0],
            z_Bx2xE[:, 1],
            temperature=scale,
            composition=ids_B,
            variant=settings.variant,
            hardness=settings.hardness,
            mesh=mesh,
            global_negatives=settings.negatives == "global",
            groups=groups,
        )
        aux = _with_tokens(aux, groups, (batch["eos"] + 1).sum(1))
        n_real = (composition_B >= 0).sum()
        # Padding rows (end of the validation pieces) are easy negatives: a batch with some counts
        # only where there is no full one.
        weight = jnp.where(n_real == n_rows, n_rows, n_real * 1e-6).astype(jnp.float32)
        n_tokens = (batch["eos"] + 1).sum().astype(jnp.float32)
        if learned:
            aux = {**aux, "temperature": jax.lax.stop_gradient(scale)}
        return value, {**aux, "n_tokens": n_tokens, "weight": weight}

    return BatchLoss(embed, compare, parts)


def _temperature(start: float, model: Model) -> jax.Array:
    if model.log_temperature is None:
        return jnp.float32(start)
    return jnp.maximum(jnp.float32(start) * jnp.exp(model.log_temperature[...]), MIN_TEMPERATURE)


@lru_cache(maxsize=8)
def _classify(pooling: str, n_sources: int) -> LossFunction:
    def loss(model: Model, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        logits = model.pooled(batch["tokens"], batch["eos"], pooling, dropout_key=key)
        used_B = (batch["piece"] >= 0).astype(jnp.float32)
        groups = _groups(batch, n_sources)
        value, aux = classification_loss(logits, batch["label"], used_B, groups)
        aux = _with_tokens(aux, groups, batch["n_tokens"])
        return value, {
            **aux,
            "n_tokens": batch["n_tokens"].sum().astype(jnp.float32),
            "weight": used_B.sum(),
        }

    return loss


@lru_cache(maxsize=8)
def class_predictions(pooling: str) -> Predictions:
    """What `file_metrics` needs of each row of `classify`."""

    def predictions(model: Model, batch: Batch) -> dict[str, jax.Array]:
        # The same network on the same rows as in the loss: compiled together, computed once.
        logits_BxC = model.pooled(batch["tokens"], batch["eos"], pooling)
        kept = {name: batch[name] for name in ("label", "piece", "n_tokens")}
        return {"probabilities": jax.nn.softmax(logits_BxC.astype(jnp.float32)), **kept}

    return predictions


def file_metrics(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Per-file scores from per-slice predictions, averaged with their tokens as weights.

    Args:
        batches: what `Task.predictions` gave; all slices of every file must be among them.

    Returns:
        "file_accuracy", "file_macro_f1" (of the classes that occur or are predicted), "n_files".
    """
    from sklearn.metrics import accuracy_score, f1_score

    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    files, file_FxC = file_probabilities(rows["probabilities"], rows["n_tokens"], rows["piece"])
    first = {piece: row for row, piece in reversed(list(enumerate(rows["piece"].tolist())))}
    y_true = rows["label"][[first[piece] for piece in files.tolist()]]
    y_pred = file_FxC.argmax(1)
    return {
        "file_accuracy": float(accuracy_score(y_true, y_pred)),
        "file_macro_f1": float(f1_score(y_true, y_pred, average="macro", zero_division=0)),
        "n_files": float(len(files)),
    }
