"""The golden files that are drawn anew wherever they are needed: 14 MB less to keep.

`RandomState` draws the same numbers in every version of NumPy, which `Generator` does not promise.
"""

import gzip
import shutil
from pathlib import Path

import numpy as np

CONFIG = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "ff_mult": 4,
    "drop_p": 0.0,
    "max_seq_len": 512,
    "grad_checkpoint": False,
    "vocab_size": 17_727,
    "emb_size": 16,
    "class_size": 5,
}
HEADS = {
    "lm": {"lm_head.weight": ("vocab_size", "d_model")},
    "emb": {"emb_head.weight": ("emb_size", "d_model")},
    "cl": {"class_head.weight": ("class_size", "d_model")},
    "lm_cnd": {
        "lm_head.weight": ("vocab_size", "d_model"),
        "embedding_adapter.weight": ("d_model", "emb_size"),
    },
}


def weights(name: str) -> dict[str, np.ndarray]:
    """Random float32 weights of the reference's network `name`, under their published names."""
    width, hidden = CONFIG["d_model"], CONFIG["d_model"] * CONFIG["ff_mult"]
    shapes = {"model.tok_embeddings.weight": (CONFIG["vocab_size"], width)}
    for i in range(CONFIG["n_layers"]):
        layer = f"model.encode_layers.{i}."
        shapes |= {
            layer + "mixed_qkv.weight": (3 * width, width),
            layer + "att_proj_linear.weight": (width, width),
            layer + "ff_gate_proj.weight": (hidden, width),
            layer + "ff_up_proj.weight": (hidden, width),
            layer + "ff_down_proj.weight": (width, hidden),
        }
        for norm in ("norm1", "norm2"):
            shapes |= {layer + norm + ".weight": (width,), layer + norm + ".bias": (width,)}
    shapes |= {"model.out_layer_norm.weight": (width,), "model.out_layer_norm.bias": (width,)}
    shapes |= {key: (CONFIG[out], CONFIG[in_]) for key, (out, in_) in HEADS[name].items()}
    random = np.random.RandomState(sorted(HEADS).index(name))
    return {key: _drawn(random, key, shape) for key, shape in shapes.items()}


def _drawn(random: np.random.RandomState, key: str, shape: tuple[int, ...]) -> np.ndarray:
    values = random.standard_normal(shape)
    if len(shape) == 1:
        values = 0.1 * values + key.endswith("weight")
    elif "tok_embeddings" not in key:
        values /= np.sqrt(shape[-1])
    return values.astype(np.float32)


def sampling_logits() -> np.ndarray:
    """Float32 [5, 17727] logits of very unequal probabilities."""
    return (3 * np.random.RandomState(6).standard_normal((5, 17_727))).astype(np.float32)


def unpack_golden(folder: Path) -> Path:
    """The golden files of this repository in `folder`, laid out as the large set beside it is."""
    from safetensors.numpy import save_file

    here = Path(__file__).parent
    shutil.copytree(here, folder, ignore=shutil.ignore_patterns("*.py"), dirs_exist_ok=True)
    (folder / "vocab.json").write_bytes(gzip.decompress((here / "vocab.json.gz").read_bytes()))
    np.savez(folder / "sampling_logits.npz", logits=sampling_logits())
    for name in HEADS:
        save_file(weights(name), folder / "model" / f"{name}.safetensors")
    return folder
