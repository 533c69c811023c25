"""Weights in the layout of the published PyTorch checkpoints, to parameters and back.

Published names: `model.tok_embeddings.weight`, `model.encode_layers.N.mixed_qkv.weight`, …
Wrappers put prefixes before them (`_orig_mod.`, `module.`); a bare backbone lacks `model.`.
A PyTorch linear weight is [out, in], a parameter [in, out]. Which tensor each parameter is, it
declares itself (`models.parameter`).
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.checkpoints import hub
from aria_jax.config import ComputeConfig, Head, ModelConfig, to_dict
from aria_jax.models import ParameterSpec
from aria_jax.models.heads import (
    ADAPTER_TENSOR,
    HEAD_TENSORS,
    Model,
    model_of,
    parameter_specs,
    split_model,
    with_vocabulary,
)
from aria_jax.models.lora import Lora
from data_pipeline import storage
from data_pipeline.artifact import atomic, write_atomically
from data_pipeline.errors import UserError

METADATA = "aria_jax.config"
"""Key of our own files' metadata: the model's config as JSON."""
ABOUT_METADATA = "aria_jax.about"
"""Likewise: how the model is used, as JSON: tokenizer, pooling, reading, step."""
LORA_METADATA = "aria_jax.lora"
"""Likewise of files of adapters: their scale."""
_TABLE = "model.tok_embeddings.weight"
_BACKBONE = re.compile(r"(?:^|\.)((?:tok_embeddings|encode_layers|out_layer_norm)\..+)$")
_HEADS = "|".join(re.escape(name) for name in [*HEAD_TENSORS.values(), ADAPTER_TENSOR])
_TOP = re.compile(rf"(?:^|\.)({_HEADS})$")


def import_model(
    path: str | Path,
    *,
    n_heads: int | None = None,
    compute: ComputeConfig | None = None,
    max_seq_len: int | None = None,
    class_names: tuple[str, ...] = (),
) -> Model:
    """A float32 model with the weights of a published checkpoint.

    Tensors are read one at a time into their place, so that memory holds the model once.

    Args:
        path: .safetensors, float32, bfloat16 or float16.
        n_heads: the one size the tensors do not show; by default what the file says, or a
            config.json beside model.safetensors, or d_model / 64.
        max_seq_len: context length; likewise, or 8192, or 2048 for an embedding or class head.
        class_names: of a class head; likewise, or class0, class1, ….

    Raises:
        UserError: not a safetensors file, or tensors missing, unknown or misshapen (all named).
    """
    from safetensors import SafetensorError, safe_open

    path = storage.local(path)
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only .safetensors files are read; pickles (.bin, .pt, .pth) can run code"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="flax") as file:
            stored = _stored_names(file, str(path))
            shapes = {name: tuple(file.get_slice(n).get_shape()) for name, n in stored.items()}
            config = infer_config(
                shapes,
                str(path),
                known=_metadata(file, METADATA) or hub.config_beside(path),
                n_heads=n_heads,
                max_seq_len=max_seq_len,
                class_names=class_names,
            )
            # The file may have rows for ids that the model has none of.
            in_file = config
            if shapes[_TABLE][0] == config.vocab_size:
                in_file = dataclasses.replace(config, vocabulary=())
            check_tensors(in_file, shapes, str(path))
            merge = model_of(config, compute or ComputeConfig())

            def read(spec: ParameterSpec) -> jax.Array:
                names = tensor_names(spec)
                return _assembled(spec, (file.get_tensor(stored[name]) for name in names))

            params = jax.tree.map(read, parameter_specs(in_file))
            return merge(with_vocabulary(params, in_file, config)[0])
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def read_about(path: str | Path) -> dict[str, Any]:
    """What the file says of how its model is used; nothing where others wrote it."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return _metadata(file, ABOUT_METADATA) or {}


def _metadata(file: Any, key: str) -> dict[str, Any] | None:
    """What one of our own files says under that key; None where it is none of ours."""
    try:
        found = json.loads((file.metadata() or {}).get(key, "null"))
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _stored_names(file: Any, path: str) -> dict[str, str]:
    """Canonical name -> name in the file."""
    stored: dict[str, str] = {}
    for name in file.keys():  # noqa: SIM118
        ours = canonical_name(name)
        if ours in stored:
            raise UserError(f"{path}: {stored[ours]} and {name} are the same weight twice")
        stored[ours] = name
    return stored


def canonical_name(name: str) -> str:
    """A tensor's name as the reference's own code has it, whatever wrappers put before it."""
    if found := _BACKBONE.search(name):
        return f"model.{found.group(1)}".replace("._orig_mod.", ".")
    if found := _TOP.search(name):
        return found.group(1)
    return name


def infer_config(
    shapes: dict[str, tuple[int, ...]],
    path: str,
    *,
    known: dict[str, Any],
    n_heads: int | None,
    max_seq_len: int | None,
    class_names: tuple[str, ...],
) -> ModelConfig:
    """The architecture that tensors of these canonical names and shapes belong to.

    Args:
        known: what the file's metadata, or what lies beside it, says of it; used where an
            argument is None or empty.

    Raises:
        UserError: no Aria weights, or heads or class names that do not fit them.
    """
    up = parameter_specs(ModelConfig())["backbone"]["blocks"]["up"].published
    try:
        n_rows, d_model = shapes[_TABLE]
        ff = shapes[up.format(0)][0]
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: no Aria weights (no matrix {_TABLE}, or no first layer)"
        ) from None
    layer_number = re.compile(re.escape(up.partition("{}")[0]) + r"(\d+)\.")
    layers = [layer_number.match(name) for name in shapes]
    head: Head = next((kind for kind, name in HEAD_TENSORS.items() if name in shapes), "none")
    emb_size = None
    if head == "embedding":
        emb_size = shapes[HEAD_TENSORS["embedding"]][0]
    elif head == "lm" and ADAPTER_TENSOR in shapes:
        emb_size = shapes[ADAPTER_TENSOR][-1]
    n_heads = n_heads or known.get("n_heads") or max(d_model // 64, 1)
    if d_model % n_heads or (d_model // n_heads) % 2:
        raise UserError(f"{path}: d_model {d_model} cannot have {n_heads} heads; give --n-heads")
    if head == "class":
        n_classes = shapes[HEAD_TENSORS["class"]][0]
        class_names = tuple(
            class_names or known.get("class_names") or (f"class{i}" for i in range(n_classes))
        )
        if len(class_names) != n_classes:
            raise UserError(f"{path}: {len(class_names)} class names for {n_classes} classes")
    return ModelConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=1 + max(int(layer.group(1)) for layer in layers if layer),
        ff_mult=max(ff // d_model, 1),
        max_seq_len=max_seq_len
        or known.get("max_seq_len")
        or (8192 if head in ("lm", "none") else 2048),
        vocab_size=known.get("vocab_size") or n_rows,
        vocabulary=tuple(known.get("vocabulary") or ()),
        head=head,
        emb_size=emb_size,
        class_names=class_names if head == "class" else (),
        resid_dropout=known.get("resid_dropout", 0.0),
    )


def check_tensors(config: ModelConfig, shapes: dict[str, tuple[int, ...]], path: str) -> None:
    """Raises one `UserError` that names every tensor missing, unknown or of a wrong shape."""
    expected = tensor_shapes(config)
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - expected.keys())
    misshapen = [
        f"{name} {list(shapes[name])} (should be {list(shape)})"
        for name, shape in sorted(expected.items())
        if name in shapes and shapes[name] != shape
    ]
    parts = {"missing": missing, "unknown": unknown, "of the wrong shape": misshapen}
    if found := [f"{what} {', '.join(names)}" for what, names in parts.items() if names]:
        raise UserError(f"{path}: not the tensors of an Aria model: {'; '.join(found)}")


def tensor_names(spec: ParameterSpec) -> list[str]:
    """Names of the published tensors that hold a parameter, one a layer where it is stacked."""
    if spec.published is None:
        return []
    return [spec.published.format(layer) for layer in range(spec.shape[0] if spec.stacked else 1)]


def tensor_shape(spec: ParameterSpec) -> tuple[int, ...]:
    """Shape of each of them: [out, in] for linear layers."""
    if not spec.linear:
        return spec.layer_shape
    inputs, *outputs = spec.layer_shape
    return (math.prod(outputs), inputs)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint of that architecture."""
    specs = jax.tree.leaves(parameter_specs(config))
    return {name: tensor_shape(spec) for spec in specs for name in tensor_names(spec)}


def _assembled(spec: ParameterSpec, tensors: Iterator[Any]) -> jax.Array:
    """A parameter, float32, from the published tensors as they come."""
    value = _aligned(spec.shape)
    for layer, tensor in zip(value if spec.stacked else value[None], tensors, strict=True):
        array = np.asarray(tensor)
        if spec.linear:
            inputs, *outputs = spec.layer_shape
            array = np.moveaxis(array.reshape(*outputs, inputs), -1, 0)
        layer[...] = array
    return jnp.asarray(value)


def _published(spec: ParameterSpec, value: jax.Array) -> np.ndarray:
    """One layer of a parameter as its published tensor, float32; the inverse of `_assembled`."""
    array = np.asarray(value, np.float32)
    if spec.linear:
        array = np.moveaxis(array, 0, -1).reshape(-1, array.shape[0])
    return np.ascontiguousarray(array)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 memory that jax on a CPU takes over without a copy (64-byte boundary)."""
    count = math.prod(shape)
    memory = np.empty(count + 16, np.float32)
    skipped = -memory.ctypes.data % 64 // 4
    return memory[skipped : skipped + count].reshape(shape)


def export_model(
    model: Model,
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    compact: bool = False,
    about: dict[str, Any] | None = None,
) -> None:
    """Writes a model's weights under the published names, a tensor at a time.

    The config goes into the file's metadata, so that nothing is lost on the way back.

    Args:
        compact: of embedding and language head, only the rows of the ids that
            `config.vocabulary` names. Otherwise, as others read it, all rows; those without
            weights are zero.
        about: JSON types for the file's metadata, see `read_about`.
    """
    # The temperature of a contrastive loss is no part of the published layout.
    config = dataclasses.replace(model.config, learned_temperature=False)
    params = split_model(model)[1]
    in_file = config if compact else dataclasses.replace(config, vocabulary=())
    params, _ = with_vocabulary(params, config, in_file)
    params.pop("log_temperature", None)
    specs = parameter_specs(in_file)

    def tensors() -> Iterator[np.ndarray]:
        for spec, value in zip(jax.tree.leaves(specs), jax.tree.leaves(params), strict=True):
            for layer, _ in enumerate(tensor_names(spec)):
                tensor = _published(spec, value[layer] if spec.stacked else value)
                yield tensor if dtype == "float32" else tensor.astype(jnp.bfloat16)

    metadata = {"format": "pt", METADATA: json.dumps(to_dict(config))}
    if about:
        metadata[ABOUT_METADATA] = json.dumps(about)
    kind: Literal["F32", "BF16"] = "F32" if dtype == "float32" else "BF16"
    write_tensors(path, tensor_shapes(in_file), tensors(), metadata, kind)


def write_tensors(
    path: str | Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator[np.ndarray],
    metadata: dict[str, str],
    kind: Literal["F32", "BF16"] = "F32",
) -> None:
    """A safetensors file: length of the header (uint64), header (JSON), tensors in its order.

    It appears whole or not at all, and holds one tensor at a time in memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end, itemsize = 0, {"F32": 4, "BF16": 2}[kind]
    for name, shape in shapes.items():
        begin, end = end, end + itemsize * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(tensor.view(np.uint8).data)


def save_lora(path: str | Path, lora: Lora) -> None:
    """Writes the adapters alone, as safetensors."""
    from safetensors.numpy import save

    factors = {
        f"{name}.{side}": np.ascontiguousarray(factor)
        for side in ("a", "b")
        for name, factor in getattr(lora, side).items()
    }
    metadata = {LORA_METADATA: json.dumps({"scale": lora.scale})}
    write_atomically(Path(path), save(factors, metadata=metadata))


def load_lora(path: str | Path) -> Lora:
    """Reads what `save_lora` wrote.

    Raises:
        UserError: not there, or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = _metadata(file, LORA_METADATA)
            names = file.keys()
            tensors = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None
    if metadata is None:
        raise UserError(f"{path}: holds no LoRA adapters")
    sides = {
        side: {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(f".{side}")}
        for side in ("a", "b")
    }
    return Lora(**sides, scale=metadata["scale"])
