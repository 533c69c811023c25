"""Which tensors a published checkpoint has, and which architecture its tensors belong to."""

import re
from typing import Any

from aria_jax.config import Head, ModelConfig
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
_HEAD: dict[Head, str] = {
    "lm": "lm_head.weight",
    "embedding": "emb_head.weight",
    "class": "class_head.weight",
}
_ADAPTER = "embedding_adapter.weight"
_BACKBONE = re.compile(r"(?:^|\.)((?:tok_embeddings|encode_layers|out_layer_norm)\..+)$")
_TOP = re.compile(r"(?:^|\.)((?:lm_head|emb_head|class_head|embedding_adapter)\.weight)$")


def canonical_name(name: str) -> str:
    """A tensor's name as the reference's own code has it, whatever wrappers put before it."""
    if found := _BACKBONE.search(name):
        return f"model.{found.group(1)}".replace("._orig_mod.", ".")
    if found := _TOP.search(name):
        return found.group(1)
    return name


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
        names[("adapter",)] = _ADAPTER
    return names


def reference_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of a reference tensor, [out, in] for matrices."""
    d, ff, emb = config.d_model, config.d_model * config.ff_mult, config.emb_size or 0
    kind = name.rsplit(".", 2)[-2]
    return {
        "tok_embeddings": (config.vocab_size, d),
        "mixed_qkv": (3 * d, d),
        "att_proj_linear": (d, d),
        "ff_gate_proj": (ff, d),
        "ff_up_proj": (ff, d),
        "ff_down_proj": (d, ff),
        "lm_head": (config.vocab_size, d),
        "emb_head": (emb, d),
        "class_head": (len(config.class_names), d),
        "embedding_adapter": (d, emb),
    }.get(kind, (d,))


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
        known: what the file's metadata says of it; used where an argument is None or empty.

    Raises:
        UserError: no Aria weights, or heads or class names that do not fit them.
    """
    try:
        vocab_size, d_model = shapes["model.tok_embeddings.weight"]
        ff = shapes["model.encode_layers.0.ff_up_proj.weight"][0]
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: no Aria weights (no matrix model.tok_embeddings.weight, or no first layer)"
        ) from None
    layers = [re.match(r"model\.encode_layers\.(\d+)\.", name) for name in shapes]
    head: Head = next((kind for kind, name in _HEAD.items() if name in shapes), "none")
    emb_size = None
    if head == "embedding":
        emb_size = shapes["emb_head.weight"][0]
    elif head == "lm" and _ADAPTER in shapes:
        emb_size = shapes[_ADAPTER][-1]
    n_heads = n_heads or known.get("n_heads") or max(d_model // 64, 1)
    if d_model % n_heads or (d_model // n_heads) % 2:
        raise UserError(f"{path}: d_model {d_model} cannot have {n_heads} heads; give --n-heads")
    if head == "class":
        n_classes = shapes["class_head.weight"][0]
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
        vocab_size=vocab_size,
        head=head,
        emb_size=emb_size,
        class_names=class_names if head == "class" else (),
        resid_dropout=known.get("resid_dropout", 0.0),
    )


def check_tensors(config: ModelConfig, shapes: dict[str, tuple[int, ...]], path: str) -> None:
    """Raises one `UserError` that names every tensor missing, unknown or of a wrong shape."""
    expected = {
        name: reference_shape(name, config)
        for names in reference_names(config).values()
        for name in ([names] if isinstance(names, str) else names)
    }
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
