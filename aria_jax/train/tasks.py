"""The four tasks as small plug-ins of the one loop: which batches, and which loss on them."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aria_jax.config import RunConfig
from aria_jax.losses.classification import classification_loss
from aria_jax.losses.contrastive import contrastive_loss
from aria_jax.losses.language_model import next_token_loss
from aria_jax.models.heads import Model
from data_pipeline import loaders
from data_pipeline.augment import AugmentConfig

Batch = dict[str, Any]
LossFunction = Callable[[Model, Batch, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True)
class Task:
    """What the loop needs to know.

    Attributes:
        loss: (model, batch, dropout key or None) -> (loss, aux). `aux["n_tokens"]` counts the
            tokens seen; the other entries are averaged and logged.
        train: batches of this process from a step on, without end.
        evaluate: batches of one pass over the validation pieces.
    """

    loss: LossFunction
    train: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[], Iterator[Batch]]


def resolve(config: RunConfig, data_dir: str | Path) -> RunConfig:
    """`config` with what only the data can say: the class names of the label to learn."""
    if config.task != "classify" or config.model.class_names:
        return config
    names = loaders.label_values(data_dir, config.data.label)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, class_names=names))


def build_task(
    config: RunConfig, data_dir: str | Path, *, shard_index: int = 0, shard_count: int = 1
) -> Task:
    """The task of `config`, reading shard `shard_index` of `shard_count` of every batch."""
    common = {
        "seq_len": config.data.seq_len,
        "global_batch": config.data.global_batch,
        "seed": config.train.seed,
        "shard_index": shard_index,
        "shard_count": shard_count,
    }
    augment = AugmentConfig() if config.data.augment else None
    make, loss, extra = {
        "pretrain": (loaders.lm_windows, _language_model, {"packing": config.data.packing}),
        "continue": (
            loaders.lm_windows,
            _language_model,
            {"packing": config.data.packing, "add_dim": True},
        ),
        "contrastive": (loaders.contrastive_pairs, _contrastive, _slice_notes(config)),
        "classify": (
            loaders.labelled_slices,
            _classify,
            {
                **_slice_notes(config),
                "label": config.data.label,
                "class_names": config.model.class_names,
            },
        ),
    }[config.task]

    def batches(split: str, **options: Any) -> Any:
        return make(data_dir, split=split, **common, **extra, **options)

    return Task(
        loss=loss(config),
        train=lambda step: batches("train", augment=augment, workers=config.data.workers).iterate(
            step
        ),
        evaluate=lambda: batches("val", augment=None, epochs=1, shuffle=False).iterate(),
    )


def _slice_notes(config: RunConfig) -> dict[str, int]:
    return {
        "min_slice_notes": config.data.min_slice_notes,
        "max_slice_notes": config.data.max_slice_notes,
    }


def _language_model(config: RunConfig) -> LossFunction:
    packed = config.data.packing == "best-fit"

    def loss(model: Model, batch: Batch, key: jax.Array | None):
        hidden = model.hidden(
            batch["inputs"],
            positions=batch["positions"] if packed else None,
            segment_ids=batch["segment_ids"] if packed else None,
            dropout_key=key,
        )
        return next_token_loss(
            hidden,
            model.head[...],
            batch["targets"],
            batch["loss_mask"],
            z_loss=config.train.z_loss,
        )

    return loss


def _contrastive(config: RunConfig) -> LossFunction:
    def loss(model: Model, batch: Batch, key: jax.Array | None):
        tokens_Bx2xL, eos_Bx2 = batch["tokens"], batch["eos"]
        flat = tokens_Bx2xL.reshape(-1, tokens_Bx2xL.shape[-1])
        z = model.pooled(flat, eos_Bx2.reshape(-1), config.train.pooling, dropout_key=key)
        z_Bx2xE = z.reshape(len(eos_Bx2), 2, -1)
        value, aux = contrastive_loss(
            z_Bx2xE[:, 0],
            z_Bx2xE[:, 1],
            temperature=config.train.temperature,
            composition=batch["composition"],
        )
        return value, {**aux, "n_tokens": (eos_Bx2 + 1).sum()}

    return loss


def _classify(config: RunConfig) -> LossFunction:
    def loss(model: Model, batch: Batch, key: jax.Array | None):
        logits = model.pooled(batch["tokens"], batch["eos"], config.train.pooling, dropout_key=key)
        value, aux = classification_loss(logits, batch["label"])
        return value, {**aux, "n_tokens": (batch["eos"] + 1).sum()}

    return loss


def to_device(batch: Batch, sharding: jax.sharding.NamedSharding) -> Batch:
    """This process's rows as arrays of the global batch."""
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }
