"""Models on disk: what a run or `save_model` wrote, or a published .safetensors, as a `Model`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.checkpoints import check_model, hub, model_path
from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.checkpoints.safetensors import import_model, read_about
from aria_jax.config import (
    SLICE_NOTES,
    SLICE_TOKENS,
    ComputeConfig,
    ModelConfig,
    to_dict,
)
from aria_jax.models import Parameters, Specs, abstract_parameters, parameter_shardings
from aria_jax.models.heads import (
    Model,
    model_of,
    parameter_specs,
    split_model,
    with_vocabulary,
)
from aria_jax.models.lora import Lora, LoraTraining
from aria_jax.sharding import replicated
from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.midi import STANDARD
from data_pipeline.settings import from_dict
from data_pipeline.shards import READING_BEFORE
from data_pipeline.tokenizers import Tokenizer

PRESETS = ("aria", "pedal")


@dataclass(frozen=True)
class LoadedModel:
    """A model from disk.

    Attributes:
        model: with its weights.
        config: its architecture.
        tokenizer: preset of the tokenizer it was trained with.
        step: optimiser steps it was trained for.
        path: where it was read from.
        pooling: where the head was trained to read: "eos" or "mean".
        reading: how the MIDI files of its corpus were read, as `data_pipeline.midi.reading_name`.
        corpus: token shards it was trained on; "" where unknown.
        adapted: whether adapters were merged into the weights they belong to.
        slices: notes and tokens of the slices that it embeds best: 300 and 2,048 as the paper has
            them, or those it was trained on where they were shorter.
    """

    model: Model
    config: ModelConfig
    tokenizer: str
    step: int
    path: str
    pooling: str = "eos"
    reading: str = STANDARD
    corpus: str = ""
    adapted: bool = False
    slices: tuple[int, int] = (SLICE_NOTES, SLICE_TOKENS)

    @property
    def about(self) -> dict[str, Any]:
        """How it is used, as a file of weights says it (see `safetensors.export_model`)."""
        kept = ("tokenizer", "pooling", "reading", "step", "slices")
        return {name: getattr(self, name) for name in kept}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of config, step and a sample of each weight: tells two models apart."""
        config = to_dict(self.config)
        if not config["vocabulary"]:  # as before there was such a setting
            del config["vocabulary"]
        digest = hashlib.sha256(json.dumps([config, self.step]).encode())
        for leaf in jax.tree.leaves(split_model(self.model)[1]):
            digest.update(np.asarray(leaf.reshape(-1)[:1024]).tobytes())
        return digest.hexdigest()[:16]


def model_record(config: ModelConfig, tokenizer: str, reading: str = STANDARD) -> dict[str, Any]:
    """The part of a checkpoint's record that `load_model` needs."""
    return {
        "reading": reading,
        "model": to_dict(config),
        "tokenizer": {"preset": tokenizer, "hash": Tokenizer.preset(tokenizer).hash},
    }


def save_model(
    path: str | Path,
    model: Model,
    *,
    tokenizer: str = "aria",
    step: int = 0,
    reading: str = STANDARD,
) -> None:
    """Writes a model as a checkpoint that `load_model`, `--checkpoint` and `--init-from` take."""
    checkpointer = Checkpointer(path)
    try:
        if checkpointer.steps():
            raise UserError(f"{path}: already holds checkpoints; name a new directory")
        record = model_record(model.config, tokenizer, reading)
        checkpointer.save(step, split_model(model)[1], record)
    finally:
        checkpointer.close()


def load_model(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    compute: ComputeConfig | None = None,
    base: str | Path | None = None,
    step: int | None = None,
) -> LoadedModel:
    """The newest intact model of a run or of `save_model`, on one device or sharded over a mesh; or
    that of a .safetensors file, or of weights by their name: released ones, hf://OWNER/NAME.

    A run that keeps a moving average of its weights gives that average; one that trained adapters
    gives them merged into the weights they belong to. The weights of the lowest validation loss
    are a model of their own, in the folder `best` of the run's workdir.

    Args:
        dtype: of the weights, e.g. bfloat16; None keeps them as they were saved.
        base: where the weights that adapters belong to are now, if not where they were.
        step: of a run, whose checkpoint is taken instead of the newest intact one.

    Raises:
        UserError: no checkpoint there, or one that another version wrote, or adapters without
            their base.
    """
    if model_path(path).suffix == ".safetensors":
        if step is not None:
            raise UserError(f"{path}: a file of weights has one step, no others to choose from")
        return _from_safetensors(path, mesh, dtype, compute)
    checkpointer = _opened(storage.local(path))

    def read(step: int) -> LoadedModel:
        record = checkpointer.record(step)
        preset = record["tokenizer"]["preset"]
        if record["tokenizer"]["hash"] != Tokenizer.preset(preset).hash:
            raise UserError(f"{path}: trained with another version of the {preset} tokenizer")
        config = from_dict(ModelConfig, record["model"])
        merge = model_of(config, compute or ComputeConfig())
        specs = parameter_specs(config)
        item = "ema" if record.get("ema") else "params"

        def restore(specs: Specs) -> Parameters:
            return checkpointer.restore(step, item, abstract_parameters(specs, mesh, dtype))

        if (saved := record.get("lora")) is None:
            restored = restore(specs)
        else:
            read_base = partial(read_model, mesh=mesh, dtype=dtype)
            restored = merged_with_base(
                saved, config, restore=restore, read_base=read_base, mesh=mesh, base=base
            )
        run = record.get("config", {})
        pooling = run.get("train", {}).get("pooling", "eos")
        reading = record.get("reading", READING_BEFORE)
        corpus = record.get("corpus", {}).get("path", "")
        return LoadedModel(
            model=merge(restored),
            config=config,
            tokenizer=preset,
            step=step,
            path=str(path),
            pooling=pooling,
            reading=reading,
            corpus=corpus,
            adapted=saved is not None,
            slices=_slices_of(run.get("data", {})),
        )

    try:
        if step is None:
            return checkpointer.newest(read)[1]
        if step not in (kept := checkpointer.steps()):
            raise UserError(
                f"{path}: no checkpoint of step {step}; it keeps {', '.join(map(str, kept))}"
            )
        return read(step)
    finally:
        checkpointer.close()


def _from_safetensors(
    source: str | Path,
    mesh: jax.sharding.Mesh | None,
    dtype: jax.typing.DTypeLike | None,
    compute: ComputeConfig | None,
) -> LoadedModel:
    path = model_path(source)
    model = import_model(path, compute=compute)
    about = read_about(path)
    merge, params = split_model(model)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(parameter_specs(model.config), mesh))
    return LoadedModel(
        model=merge(params),
        config=model.config,
        tokenizer=about.get("tokenizer") or preset_of(str(source), model.config.vocab_size),
        step=about.get("step", 0),
        path=str(source),
        pooling=about.get("pooling", "eos"),
        reading=about.get("reading", STANDARD),
        slices=tuple(about.get("slices", (SLICE_NOTES, SLICE_TOKENS))),
    )


def _slices_of(data: dict[str, Any]) -> tuple[int, int]:
    """What `slices` follows from the data settings of a run."""
    if (most := data.get("max_slice_notes", SLICE_NOTES)) >= SLICE_NOTES:
        return SLICE_NOTES, SLICE_TOKENS
    return most, data["seq_len"]


def preset_of(source: str, vocab_size: int, asked: str | None = None) -> str:
    """The tokenizer preset of a model with so many tokens.

    Raises:
        UserError: none has, or not the one that was asked for.
    """
    sizes = {name: Tokenizer.preset(name).vocab_size for name in ([asked] if asked else PRESETS)}
    for name, size in sizes.items():
        if size == vocab_size:
            return name
    known = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise UserError(
        f"{source} has {vocab_size} tokens, but tokenizer {known}"
        + ("; choose another with --tokenizer" if asked else ": it was trained with another one")
    )


def load_adapters(path: str | Path) -> Lora:
    """The newest adapters of a run, without the weights they belong to.

    Raises:
        UserError: the run has no adapters, or trained a new head beside them.
    """
    checkpointer = _opened(storage.local(path))

    def read(step: int) -> Lora:
        record = checkpointer.record(step)
        if (saved := record.get("lora")) is None:
            raise UserError(f"{path}: trained all weights (no train.lora_rank): it has no adapters")
        training = LoraTraining.from_record(saved)
        specs, _ = training.split_specs(parameter_specs(from_dict(ModelConfig, record["model"])))
        if specs["full"]:
            raise UserError(
                f"{path}: trained its {' and '.join(specs['full'])} too, which is no adapter; "
                "use `aria-jax convert merge` to write the whole model"
            )
        item = "ema" if record.get("ema") else "params"
        return training.lora(checkpointer.restore(step, item, abstract_parameters(specs, None)))

    try:
        return checkpointer.newest(read)[1]
    finally:
        checkpointer.close()


def _opened(path: Path) -> Checkpointer:
    """The checkpoints of a workdir that has some."""
    check_model(path)
    checkpointer = Checkpointer(path, read_only=True)
    if not checkpointer.steps():
        checkpointer.close()
        raise UserError(f"{path}: its checkpoints folder is empty; was the run interrupted?")
    return checkpointer


def read_model(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Model:
    """The model of a run, of `save_model`, of a .safetensors file, or one by its name."""
    if (file := model_path(path)).suffix == ".safetensors":
        return import_model(file)
    return load_model(path, mesh=mesh, dtype=dtype).model


def merged_with_base(
    saved: dict[str, Any],
    config: ModelConfig,
    *,
    restore: Callable[[Specs], Parameters],
    read_base: Callable[[Path], Model],
    mesh: jax.sharding.Mesh | None,
    base: str | Path | None = None,
) -> Parameters:
    """The whole weights of a checkpoint that holds adapters.

    Args:
        saved: `lora_record` of the checkpoint.
        config: of the whole model.
        restore: reads parameters, given their specs.
        read_base: reads a model.
        base: where the base is now, if not where it was.

    Raises:
        UserError: the base is gone, or has changed since.
    """
    training = LoraTraining.from_record(saved)
    base_path = model_path(saved["base"] if base is None else base)
    base_params = base_weights(base_path, saved, read_base, config)
    specs = parameter_specs(config)
    trained_specs, frozen_specs = training.split_specs(specs)
    frozen = {name: base_params[name] for name in frozen_specs}
    shardings = None
    if mesh is not None:
        shardings = parameter_shardings(specs, mesh)
        frozen = jax.device_put(frozen, {name: shardings[name] for name in frozen})
    return jax.jit(training.join, out_shardings=shardings)(restore(trained_specs), frozen)


def lora_record(
    training: LoraTraining, base: str | Path, base_params: Parameters
) -> dict[str, Any]:
    """What a checkpoint says of its adapters and of their base, as JSON types."""
    name = hub.pinned(base) if hub.is_name(base) else storage.url(Path(base).absolute())
    return {**training.record(), "base": name, "fingerprint": params_digest(base_params)}


def base_weights(
    base_path: Path,
    saved: dict[str, Any],
    read_base: Callable[[Path], Model],
    config: ModelConfig,
) -> Parameters:
    """The weights at `base_path`, if they are those that the adapters of `saved` were trained on,
    with the token ids of `config`.

    Raises:
        UserError: they are not there, or not the same.
    """
    if not base_path.exists():
        raise UserError(
            f"{base_path} is gone, and this run holds only the adapters trained on it: put it "
            "back, or name its new place (aria-jax convert merge RUN OUT --base PLACE)"
        )
    base = read_base(base_path)
    params = split_model(base)[1]
    if params_digest(params) != saved["fingerprint"]:
        raise UserError(
            f"{base_path} has changed since adapters were trained on it, so that the sum would be "
            "wrong; bring back the weights of that time"
        )
    return with_vocabulary(params, base.config, config)[0]


def params_digest(params: Parameters) -> str:
    """Hex digest of a sample of each weight, at bfloat16 so that any float type gives the same."""

    def sample(params: Parameters) -> Sequence[jax.Array]:
        leaves = jax.tree.leaves(params)
        rows = [leaf[(0,) * (leaf.ndim - 1)][:64] if leaf.ndim else leaf[None] for leaf in leaves]
        return [row.astype(jnp.bfloat16).astype(jnp.float32) for row in rows]

    sharding = jax.tree.leaves(params)[0].sharding
    everywhere = None
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.Mesh
    ):
        everywhere = replicated(sharding.mesh)
    digest = hashlib.sha256()
    for row in jax.jit(sample, out_shardings=everywhere)(params):
        digest.update(np.asarray(row).tobytes())
    return digest.hexdigest()[:16]
