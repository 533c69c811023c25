"""Weights in the layout of the published PyTorch checkpoints, to ours and back.

Reference names: `model.tok_embeddings.weight`, `model.encode_layers.N.mixed_qkv.weight`, …
Wrappers put prefixes before them (`_orig_mod.`, `module.`); a bare backbone lacks `model.`.
A PyTorch linear weight is [out, in]; ours [in, out].
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aria_jax.checkpoints.published import (
    canonical_name,
    check_tensors,
    infer_config,
    reference_names,
    reference_shape,
)
from aria_jax.config import ComputeConfig, to_dict
from aria_jax.models.heads import Model, abstract_model
from aria_jax.models.lora import Lora
from data_pipeline.artifact import atomic, write_atomically
from data_pipeline.errors import UserError

METADATA = "aria_jax.config"
"""Key of our own files' metadata: the model's config as JSON."""
LORA_METADATA = "aria_jax.lora"
"""Likewise of files of adapters: their scale."""


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
        n_heads: the one size the tensors do not show; d_model / 64 by default.
        max_seq_len: context length; 8192, or 2048 for an embedding or class head, by default.
        class_names: of a class head; class0, class1, … by default.

    Raises:
        UserError: not a safetensors file, or tensors missing, unknown or misshapen (all named).
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only .safetensors files are read; pickles (.bin, .pt, .pth) can run code"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="flax") as file:
            stored = _stored_names(file, str(path))
            shapes = {ours: tuple(file.get_slice(n).get_shape()) for ours, n in stored.items()}
            config = infer_config(
                shapes,
                str(path),
                known=json.loads((file.metadata() or {}).get(METADATA, "{}")),
                n_heads=n_heads,
                max_seq_len=max_seq_len,
                class_names=class_names,
            )
            check_tensors(config, shapes, str(path))
            graph, state = nnx.split(abstract_model(config, compute or ComputeConfig()))
            flat = dict(nnx.to_flat_state(state))
            for key, names in reference_names(config).items():
                tensors = (file.get_tensor(stored[name]) for name in _listed(names))
                flat[key] = flat[key].replace(_assembled(flat[key].shape, names, tensors))
            return nnx.merge(graph, nnx.from_flat_state(flat))
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _stored_names(file, path: str) -> dict[str, str]:
    """Canonical name -> name in the file."""
    stored: dict[str, str] = {}
    for name in file.keys():  # noqa: SIM118
        ours = canonical_name(name)
        if ours in stored:
            raise UserError(f"{path}: {stored[ours]} and {name} are the same weight twice")
        stored[ours] = name
    return stored


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _assembled(shape: tuple[int, ...], names: str | list[str], tensors) -> jax.Array:
    """One of our parameters, float32, from the reference's tensors as they come."""
    value = _aligned(shape)
    layers = value[None] if isinstance(names, str) else value
    for layer, name, tensor in zip(layers, _listed(names), tensors, strict=True):
        layer[...] = _to_ours(name, np.asarray(tensor))
    return jnp.asarray(value)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 memory that jax on a CPU takes over without a copy (64-byte boundary)."""
    count = int(np.prod(shape))
    memory = np.empty(count + 16, np.float32)
    skipped = -memory.ctypes.data % 64 // 4
    return memory[skipped : skipped + count].reshape(shape)


def _to_ours(name: str, tensor: np.ndarray) -> np.ndarray:
    """One reference tensor in our layout."""
    if name.endswith("mixed_qkv.weight"):
        d = tensor.shape[1]
        return tensor.reshape(3, d, d).transpose(2, 0, 1)  # [3D, D] -> [D, 3, D]
    if tensor.ndim == 2 and not name.endswith("tok_embeddings.weight"):
        return tensor.T
    return tensor


def _to_theirs(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `_to_ours`."""
    if name.endswith("mixed_qkv.weight"):
        return np.ascontiguousarray(array.transpose(1, 2, 0).reshape(-1, array.shape[0]))
    if array.ndim == 2 and not name.endswith("tok_embeddings.weight"):
        return np.ascontiguousarray(array.T)
    return np.ascontiguousarray(array)


def export_model(model: Model, path: str | Path) -> None:
    """Writes a model's weights as float32 under the reference's names, a tensor at a time.

    The config goes into the file's metadata, so that nothing is lost on the way back.
    """
    config, flat = model.config, dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    # The temperature of a contrastive loss is no part of the published layout.
    kept = dataclasses.replace(config, learned_temperature=False)
    places = [
        (name, key, None if isinstance(names, str) else layer)
        for key, names in reference_names(config).items()
        for layer, name in enumerate(_listed(names))
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", METADATA: json.dumps(to_dict(kept))}}
    end = 0
    for name, _, _ in places:
        shape = reference_shape(name, config)
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}

    def tensors() -> Iterator[np.ndarray]:
        for name, key, layer in places:
            value = flat[key][...] if layer is None else flat[key][layer]
            yield _to_theirs(name, np.asarray(value, np.float32))

    _write(path, header, tensors())


def _write(path: str | Path, header: dict[str, Any], tensors: Iterator[np.ndarray]) -> None:
    """A safetensors file: length of the header (uint64), header (JSON), tensors in its order.

    It appears whole or not at all.
    """
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(tensor.data)


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
            metadata = (file.metadata() or {}).get(LORA_METADATA)
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
    return Lora(**sides, scale=json.loads(metadata)["scale"])
