"""The four tasks as small plug-ins of the one loop: which batches, and which loss on them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.config import CORPUS, SLICE_NOTES, ModelConfig, RunConfig
from aria_jax.losses.contrastive import contrastive_loss
from aria_jax.losses.cross_entropy import classification_loss, file_probabilities, next_token_loss
from aria_jax.models.heads import Model, check_known
from aria_jax.models.transformer import token_rows
from aria_jax.sharding import platform
from aria_jax.train.init import compute_dtype
from data_pipeline.artifact import json_digest
from data_pipeline.errors import UserError
from data_pipeline.loaders import BatchStream
from data_pipeline.loaders.slice_batches import contrastive_pairs, label_values, labelled_slices
from data_pipeline.loaders.windows import lm_windows
from data_pipeline.shards import TokenShards, load_manifest, occurring_ids
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import ranges_of

Batch = dict[str, Any]
Aux = dict[str, jax.Array]
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


@dataclass(frozen=True)
class Task:
    """What the loop needs to know.

    Attributes:
        loss: (model, batch, dropout key or None) -> (loss, aux). `aux["n_tokens"]` counts the
            tokens seen, `aux["weight"]` is what the loss is a mean over (tokens, rows); the other
            entries are averaged like the loss, and logged.
        train: without end.
        evaluate: one pass over the validation pieces; None where they cannot be used.
        predictions: (model, batch) -> what `file_metrics` needs of each row; None where files
            have no classes.
        notes: what whoever trains should know beforehand.
    """

    loss: LossFunction
    train: BatchStream
    evaluate: BatchStream | None
    predictions: Predictions | None = None
    notes: tuple[str, ...] = ()


def resolve(
    config: RunConfig,
    data_dir: str | Path,
    workdir: str | Path | None = None,
    *,
    accelerator: bool | None = None,
) -> RunConfig:
    """`config` with what only the data can say (vocabulary, names of the classes, steps), and what
    number type "auto" stands for.

    Args:
        workdir: of a run that may have started.
        accelerator: whether it is for a GPU or TPU; None for the devices of this process.
    """
    if config.compute.dtype == "auto":
        if accelerator is None:
            accelerator = platform() != "cpu"
        dtype = compute_dtype(workdir, accelerator)
        config = dataclasses.replace(
            config, compute=dataclasses.replace(config.compute, dtype=dtype)
        )
    preset = load_manifest(data_dir)["tokenizer"]["preset"]
    model = dataclasses.replace(config.model, vocab_size=Tokenizer.preset(preset).vocab_size)
    if model.vocabulary:
        model = dataclasses.replace(model, vocabulary=_vocabulary(model, preset, data_dir))
    if config.task == "classify" and config.data.label and not model.class_names:
        names = label_values(data_dir, config.data.label)
        model = dataclasses.replace(model, class_names=names)
    config = dataclasses.replace(config, model=model)
    if config.train.epochs is None:
        return config
    rows = config.train.epochs * build_task(config, data_dir).train.n_examples
    steps = max(1, math.ceil(rows / config.data.global_batch))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def _vocabulary(model: ModelConfig, preset: str, data_dir: str | Path) -> tuple[str, ...]:
    """The ids that a run has weights for: those asked for, or those the data can hold.

    Raises:
        UserError: those asked for lack some.
    """
    tokenizer = Tokenizer.preset(preset)
    reachable = _reachable(str(data_dir), json_digest(load_manifest(data_dir)), preset)
    if model.vocabulary == CORPUS:
        return ranges_of(reachable)
    check_known(model, reachable, tokenizer.tokens, str(data_dir))
    return model.vocabulary


@lru_cache(maxsize=2)
def _reachable(data_dir: str, corpus_digest: str, preset: str) -> np.ndarray:
    del corpus_digest  # of the corpus there, which another one may replace
    tokenizer = Tokenizer.preset(preset)
    return tokenizer.reachable(occurring_ids(data_dir, tokenizer.vocab_size))


def build_task(
    config: RunConfig, data_dir: str | Path, *, mesh: jax.sharding.Mesh | None = None
) -> Task:
    """The task of `config` on the corpus in `data_dir`."""
    common = {
        "seq_len": config.data.seq_len,
        "global_batch": config.data.global_batch,
        "seed": config.train.seed,
    }
    windows = {
        "packing": config.data.packing,
        "max_piece_tokens": config.data.max_piece_tokens,
    }
    loaders_by_task: dict[str, tuple[Callable[..., BatchStream], dict[str, Any]]] = {
        "pretrain": (lm_windows, windows),
        "continue": (lm_windows, {**windows, "add_dim": True}),
        "contrastive": (
            contrastive_pairs,
            {
                **_slice_notes(config),
                "consecutive": config.contrastive.consecutive,
                "composer_group": config.contrastive.composer_group,
            },
        ),
        "classify": (
            labelled_slices,
            {
                **_slice_notes(config),
                "label": config.data.label,
                "class_names": config.model.class_names,
                "slice_notes": SLICE_NOTES,
            },
        ),
    }
    make, extra = loaders_by_task[config.task]

    def batches(split: str, **options: Any) -> BatchStream:
        return make(data_dir, split=split, **common, **extra, **options)

    augment = config.augmentation if config.data.augment else None
    train = batches("train", augment=augment, workers=config.data.workers)
    evaluate: BatchStream | None = None
    notes: tuple[str, ...] = ()
    try:
        evaluate = batches("val", augment=None, epochs=1, shuffle=False)
        if config.task == "contrastive":
            _check_negatives(config, data_dir)
    except UserError as reason:
        evaluate, notes = None, (f"no validation: {reason}; no weights are kept as the best",)
    predictions = _class_predictions(config) if config.task == "classify" else None
    return Task(loss_function(config, mesh), train, evaluate, predictions, notes)


def _check_negatives(config: RunConfig, data_dir: str | Path) -> None:
    """Raises `UserError` where no validation piece is a negative of another."""
    shards = TokenShards(data_dir, "val")
    codes, _ = shards.label_codes("composition")
    n_distinct = len(np.unique(codes[codes >= 0])) + int((codes < 0).sum())
    if len(shards) < 2 or (config.contrastive.mask_composition and n_distinct < 2):
        what = "one piece" if len(shards) < 2 else f"{len(shards)} pieces of one composition"
        raise UserError(
            f"{data_dir}: the validation split is {what}, which has nothing to be told from: "
            "val/loss would always be 0 (build with a larger --val-fraction, or more files)"
        )


def loss_function(config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> LossFunction:
    """The loss of `config.task`; contrastive negatives travel round the devices of `mesh`."""
    if config.task == "contrastive":
        return _contrastive(config, mesh)
    return _classify(config) if config.task == "classify" else _language_model(config)


def batch_shapes(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What one global batch of `config.task` looks like, without reading any data."""
    rows, length = config.data.global_batch, config.data.seq_len
    ids, one = (rows, length), (rows,)
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if config.task == "contrastive":
        shapes = {
            "tokens": ((rows, 2, length), np.int32),
            "eos": ((rows, 2), np.int32),
            "composition": (one, np.int32),
        }
    elif config.task == "classify":
        names = ("eos", "label", "piece", "n_tokens")
        shapes = {"tokens": (ids, np.int32), **{name: (one, np.int32) for name in names}}
    else:
        names = ("inputs", "targets", "segment_ids", "positions")
        shapes = {"loss_mask": (ids, bool), **{name: (ids, np.int32) for name in names}}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _slice_notes(config: RunConfig) -> dict[str, int]:
    return {
        "min_slice_notes": config.data.min_slice_notes,
        "max_slice_notes": config.data.max_slice_notes,
    }


def _language_model(config: RunConfig) -> LossFunction:
    packed = config.data.packing == "best-fit"

    def loss(model: Model, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        hidden = model.hidden(
            batch["inputs"],
            positions=batch["positions"] if packed else None,
            segment_ids=batch["segment_ids"] if packed else None,
            dropout_key=key,
        )
        if (head := model.head) is None:
            raise ValueError("next tokens need a model with a head")
        value, aux = next_token_loss(
            hidden,
            head[...],
            token_rows(model.config, batch["targets"]),
            batch["loss_mask"],
            z_loss=config.train.z_loss,
        )
        return value, {**aux, "weight": aux["n_tokens"]}

    return loss


def _contrastive(config: RunConfig, mesh: jax.sharding.Mesh | None) -> BatchLoss:
    settings = config.contrastive

    def embed(model: Model, batch: Batch, key: jax.Array | None) -> jax.Array:
        tokens_Bx2xL, eos_Bx2 = batch["tokens"], batch["eos"]
        flat = tokens_Bx2xL.reshape(-1, tokens_Bx2xL.shape[-1])
        z = model.pooled(flat, eos_Bx2.reshape(-1), config.train.pooling, dropout_key=key)
        return z.reshape(len(eos_Bx2), 2, -1)

    def compare(model: Model, z_Bx2xE: jax.Array, batch: Batch) -> tuple[jax.Array, Aux]:
        composition_B, n_rows = batch["composition"], len(z_Bx2xE)
        ids_B = composition_B
        if not settings.mask_composition:
            ids_B = jnp.where(composition_B < 0, composition_B, jnp.arange(n_rows))
        temperature = _temperature(config, model)
        value, aux = contrastive_loss(
            z_Bx2xE[:, 0],
            z_Bx2xE[:, 1],
            temperature=temperature,
            composition=ids_B,
            variant=settings.variant,
            hardness=settings.hardness,
            mesh=mesh,
            global_negatives=settings.negatives == "global",
        )
        n_real = (composition_B >= 0).sum()
        # Padding rows (end of the validation pieces) are easy negatives: a batch with some counts
        # only where there is no full one.
        weight = jnp.where(n_real == n_rows, n_rows, n_real * 1e-6).astype(jnp.float32)
        n_tokens = (batch["eos"] + 1).sum().astype(jnp.float32)
        if config.model.learned_temperature:
            aux = {**aux, "temperature": jax.lax.stop_gradient(temperature)}
        return value, {**aux, "n_tokens": n_tokens, "weight": weight}

    return BatchLoss(embed, compare, config.train.grad_accumulation)


def _temperature(config: RunConfig, model: Model) -> jax.Array:
    start = jnp.float32(config.train.temperature)
    if model.log_temperature is None:
        return start
    return jnp.maximum(start * jnp.exp(model.log_temperature[...]), MIN_TEMPERATURE)


def _classify(config: RunConfig) -> LossFunction:
    def loss(model: Model, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Aux]:
        logits = model.pooled(batch["tokens"], batch["eos"], config.train.pooling, dropout_key=key)
        used_B = (batch["piece"] >= 0).astype(jnp.float32)
        value, aux = classification_loss(logits, batch["label"], used_B)
        return value, {
            **aux,
            "n_tokens": batch["n_tokens"].sum().astype(jnp.float32),
            "weight": used_B.sum(),
        }

    return loss


def _class_predictions(config: RunConfig) -> Predictions:
    def predictions(model: Model, batch: Batch) -> dict[str, jax.Array]:
        # The same network on the same rows as in the loss: compiled together, computed once.
        logits_BxC = model.pooled(batch["tokens"], batch["eos"], config.train.pooling)
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
