"""The five tasks as small plug-ins of the one loop: which batches, of one corpus or several, and
which loss on them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aria_jax.config import CORPUS, SLICE_NOTES, ModelConfig, RunConfig
from aria_jax.models.heads import check_known
from aria_jax.sharding import platform
from aria_jax.train.init import compute_dtype
from aria_jax.train.objectives import LossFunction, Predictions, class_predictions, loss_function
from data_pipeline.artifact import json_digest
from data_pipeline.errors import UserError
from data_pipeline.loaders import BatchStream
from data_pipeline.loaders.mixture import Data, Source, common_manifest, mixed, sources_of, written
from data_pipeline.loaders.scores import score_windows
from data_pipeline.loaders.slice_batches import (
    composition_numbers,
    contrastive_pairs,
    label_values,
    labelled_slices,
)
from data_pipeline.loaders.windows import lm_windows
from data_pipeline.shards import TokenShards, load_manifest, occurring_ids
from data_pipeline.tokenizers import Tokenizer, augmentations_left_out
from data_pipeline.vocabulary import ranges_of


@dataclass(frozen=True)
class Task:
    """What the loop needs to know.

    Attributes:
        loss: (model, batch, dropout key or None) -> (loss, aux). `aux["n_tokens"]` counts the
            tokens seen, `aux["weight"]` is what the loss is a mean over (tokens, rows); the other
            entries are averaged like the loss, and logged. Of a mixture, `aux["by_source"]` holds
            per corpus the sums of loss, weight and tokens.
        sources: the corpora.
        train: without end.
        evaluate: one pass over the validation pieces of each corpus that has usable ones, by name.
        predictions: (model, batch) -> what `file_metrics` needs of each row; None where files
            have no classes.
        notes: what whoever trains should know beforehand.
    """

    loss: LossFunction
    sources: tuple[Source, ...]
    train: BatchStream
    evaluate: dict[str, BatchStream]
    predictions: Predictions | None = None
    notes: tuple[str, ...] = ()


def resolve(
    config: RunConfig,
    data: Data,
    workdir: str | Path | None = None,
    *,
    accelerator: bool | None = None,
) -> RunConfig:
    """`config` with what only the data can say (vocabulary, names of the classes, steps), and what
    number type "auto" stands for.

    Args:
        data: folder of token shards, or several with their weights.
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
    sources = sources_of(data)
    preset = common_manifest(sources)["tokenizer"]["preset"]
    model = dataclasses.replace(config.model, vocab_size=Tokenizer.preset(preset).vocab_size)
    if model.vocabulary:
        model = dataclasses.replace(model, vocabulary=_vocabulary(model, preset, sources))
    if config.task == "classify" and config.data.label and not model.class_names:
        names = {n for source in sources for n in label_values(source.path, config.data.label)}
        model = dataclasses.replace(model, class_names=tuple(sorted(names)))
    config = dataclasses.replace(config, model=model)
    if len(sources) > 1:
        mixture = dataclasses.replace(config.data, sources=written(sources))
        config = dataclasses.replace(config, data=mixture)
    if config.train.epochs is None:
        return config
    rows = config.train.epochs * build_task(config, sources).train.n_examples
    steps = max(1, math.ceil(rows / config.data.global_batch))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def _vocabulary(model: ModelConfig, preset: str, sources: Sequence[Source]) -> tuple[str, ...]:
    """The ids that a run has weights for: those asked for, or those the data can hold.

    Raises:
        UserError: those asked for lack some.
    """
    tokenizer = Tokenizer.preset(preset)
    reachable = np.unique(
        np.concatenate(
            [
                _reachable(str(source.path), json_digest(load_manifest(source.path)), preset)
                for source in sources
            ]
        )
    )
    if model.vocabulary == CORPUS:
        return ranges_of(reachable)
    check_known(model, reachable, tokenizer.tokens, " and ".join(str(s.path) for s in sources))
    return model.vocabulary


@lru_cache(maxsize=2)
def _reachable(data_dir: str, corpus_digest: str, preset: str) -> np.ndarray:
    del corpus_digest  # of the corpus there, which another one may replace
    tokenizer = Tokenizer.preset(preset)
    return tokenizer.reachable(occurring_ids(data_dir, tokenizer.vocab_size))


def build_task(config: RunConfig, data: Data, *, mesh: jax.sharding.Mesh | None = None) -> Task:
    """The task of `config` on the corpus in `data`, or on a mixture of several."""
    sources = sources_of(data)
    tokenizer = Tokenizer.preset(common_manifest(sources)["tokenizer"]["preset"])
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
        "continue": (lm_windows, {**windows, "add_dim": tokenizer.dim_id >= 0}),
        "render": (score_windows, _slice_notes(config)),
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

    def batches(source: Source, split: str, **options: Any) -> BatchStream:
        return make(source.path, split=split, **common, **extra, **options)

    augment = config.augmentation if config.data.augment else None
    own: list[dict[str, Any]] = [{} for _ in sources]
    if config.task == "contrastive" and len(sources) > 1:
        numbers = composition_numbers([source.path for source in sources], "train")
        own = [{"compositions": of} for of in numbers]
    workers = config.data.workers
    parts = [
        batches(source, "train", augment=augment, workers=workers, **options)
        for source, options in zip(sources, own, strict=True)
    ]
    evaluate: dict[str, BatchStream] = {}
    notes = [*_shares(config, sources, parts)]
    if augment is not None:
        notes += augmentations_left_out(tokenizer, augment)
    if config.task == "continue" and tokenizer.dim_id < 0:
        notes.append(f"{tokenizer.scheme} has no <D>: nothing announces the end of a piece")
    for source in sources:
        try:
            stream = batches(source, "val", augment=None, epochs=1, shuffle=False)
            if config.task == "contrastive":
                _check_negatives(config, source.path)
            evaluate[source.name] = stream
        except UserError as reason:
            notes.append(f"no validation: {reason}")
    if not evaluate:
        notes[-1] += "; no weights are kept as the best"
    predictions = class_predictions(config.train.pooling) if config.task == "classify" else None
    loss = loss_function(config, mesh, len(sources))
    return Task(loss, sources, mixed(parts, sources), evaluate, predictions, tuple(notes))


def _shares(
    config: RunConfig, sources: Sequence[Source], parts: Sequence[BatchStream]
) -> Iterator[str]:
    """How often a run sees each corpus of a mixture."""
    if len(sources) == 1:
        return
    rows = config.train.steps * config.data.global_batch
    seen = (
        f"{source.name} {source.weight:.3g} of the rows, "
        f"{rows * source.weight / part.n_examples:.3g} times its {part.n_examples:,} examples"
        for source, part in zip(sources, parts, strict=True)
    )
    yield f"a mixture of {len(sources)} corpora: {'; '.join(seen)}"


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
