"""Weights in the layout of the published PyTorch checkpoints, to ours and back.

Reference names: `model.tok_embeddings.weight`, `model.encode_layers.N.mixed_qkv.weight`, …, some
under an `_orig_mod.` prefix (torch.compile). A PyTorch linear weight is [out, in]; ours [in, out].
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import Model, abstract_model
from data_pipeline.errors import UserError

_LAYER = {
    "qkv": "mixed_qkv.weight",
    "out": "att_proj_linear.weight",
    "gate": "ff_gate_proj.weight",
    "up": "ff_up_proj.weight",
    "down": "ff_down_proj.weight",
    "norm1_scale": "norm1.weight",
    "norm1_bias": "norm1.bias",
    "norm2_scale": "norm2.weight",
    "norm2_bias": "norm2.bias",
}
_HEAD = {"lm": "lm_head.weight", "embedding": "emb_head.weight", "class": "class_head.weight"}


def reference_names(config: ModelConfig) -> dict[tuple[str, ...], str | list[str]]:
    """Path of each of our parameters -> reference tensor, or one tensor a layer."""
    names: dict[tuple[str, ...], str | list[str]] = {
        ("backbone", "embedding"): "model.tok_embeddings.weight",
        ("backbone", "norm_scale"): "model.out_layer_norm.weight",
        ("backbone", "norm_bias"): "model.out_layer_norm.bias",
    }
    for ours, theirs in _LAYER.items():
        names["backbone", "blocks", ours] = [
            f"model.encode_layers.{i}.{theirs}" for i in range(config.n_layers)
        ]
    if config.head in _HEAD:
        names[("head",)] = _HEAD[config.head]
    if config.head == "lm" and config.emb_size:
        names[("adapter",)] = "embedding_adapter.weight"
    return names


def _to_ours(name: str, tensor: np.ndarray) -> np.ndarray:
    """One reference tensor in our layout, float32."""
    tensor = np.asarray(tensor, np.float32)
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


def import_model(
    path: str | Path,
    *,
    n_heads: int | None = None,
    compute: ComputeConfig | None = None,
    max_seq_len: int | None = None,
) -> Model:
    """A model with the weights of a published checkpoint; reads one tensor at a time.

    Args:
        path: .safetensors, float32, bfloat16 or float16.
        n_heads: the one size the tensors do not show; d_model / 64 by default.
        max_seq_len: context length; 8192, or 2048 for an embedding or class head, by default.

    Raises:
        UserError: not a safetensors file, or tensors missing or unknown (all named) or misshapen.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read (pickles can run code)")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="flax") as file:
            stored = {name.replace("_orig_mod.", ""): name for name in file.keys()}  # noqa: SIM118
            shapes = {ours: tuple(file.get_slice(n).get_shape()) for ours, n in stored.items()}
            config = infer_config(shapes, str(path), n_heads, max_seq_len)
            model = abstract_model(config, compute or ComputeConfig())
            graph, state = nnx.split(model)
            flat = dict(nnx.to_flat_state(state))
            _check_names(config, shapes, str(path))
            for key, names in reference_names(config).items():
                flat[key] = flat[key].replace(_read(file, stored, names, flat[key], str(path)))
            return nnx.merge(graph, nnx.from_flat_state(flat))
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _read(file, stored: dict[str, str], names: str | list[str], like, path: str) -> jax.Array:
    def one(name: str) -> np.ndarray:
        return _to_ours(name, file.get_tensor(stored[name]))

    if isinstance(names, str):
        value = one(names)
    else:
        value = np.empty(like.shape, np.float32)
        for i, name in enumerate(names):
            layer = one(name)
            if layer.shape != value.shape[1:]:
                raise UserError(f"{path}: {name} has the wrong shape")
            value[i] = layer
    if value.shape != like.shape:
        raise UserError(f"{path}: {names} has the wrong shape")
    return jnp.asarray(value)


def infer_config(
    shapes: dict[str, tuple[int, ...]], path: str, n_heads: int | None, max_seq_len: int | None
) -> ModelConfig:
    """The architecture that tensors of these names and shapes belong to."""
    try:
        vocab_size, d_model = shapes["model.tok_embeddings.weight"]
        ff = shapes["model.encode_layers.0.ff_up_proj.weight"][0]
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: no Aria weights (model.tok_embeddings.weight is missing)"
        ) from None
    n_layers = 1 + max(int(name.split(".")[2]) for name in shapes if ".encode_layers." in name)
    head = next((kind for kind, name in _HEAD.items() if name in shapes), "none")
    emb_size = None
    if head == "embedding":
        emb_size = shapes["emb_head.weight"][0]
    elif "embedding_adapter.weight" in shapes:
        emb_size = shapes["embedding_adapter.weight"][1]
    n_classes = shapes["class_head.weight"][0] if head == "class" else 0
    n_heads = n_heads or max(d_model // 64, 1)
    if d_model % n_heads or (d_model // n_heads) % 2:
        raise UserError(f"{path}: d_model {d_model} cannot have {n_heads} heads; give --n-heads")
    return ModelConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=n_layers,
        ff_mult=ff // d_model,
        max_seq_len=max_seq_len or (8192 if head in ("lm", "none") else 2048),
        vocab_size=vocab_size,
        head=head,
        emb_size=emb_size,
        class_names=tuple(f"class{i}" for i in range(n_classes)),
    )


def _check_names(config: ModelConfig, shapes: dict[str, tuple[int, ...]], path: str) -> None:
    expected: set[str] = set()
    for names in reference_names(config).values():
        expected |= {names} if isinstance(names, str) else set(names)
    missing, unknown = sorted(expected - set(shapes)), sorted(set(shapes) - expected)
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise UserError(f"{path}: not the tensors of an Aria model: {'; '.join(parts)}")


def export_model(model: Model, path: str | Path) -> None:
    """Writes a model's weights as float32 under the reference's names."""
    from safetensors.numpy import save_file

    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    tensors = {}
    for key, names in reference_names(model.config).items():
        value = np.asarray(flat[key][...], np.float32)
        if isinstance(names, str):
            tensors[names] = _to_theirs(names, value)
        else:
            tensors |= {n: _to_theirs(n, layer) for n, layer in zip(names, value, strict=True)}
    save_file(tensors, path)
