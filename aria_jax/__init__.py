"""Learning from piano performances in MIDI with JAX and Flax.

    import aria_jax
    model = aria_jax.load("run2")
    table = aria_jax.embed(model, "my_midis")        # .path, .embedding, .labels

The public names, each imported when it is first used: `dir(aria_jax)`, docs/api.md. The rooms
`train`, `generate` and `embed` can also be called, for what they do most.
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

_API = "aria_jax.api"
_CONFIG = "aria_jax.config"
_MIDI = "data_pipeline.midi"
_ERRORS = "data_pipeline.errors"

SECTIONS: dict[str, dict[str, str]] = {
    "Models on disk": {
        "load": _API,
        "save_model": "aria_jax.checkpoints.models",
        "import_model": "aria_jax.checkpoints.safetensors",
        "export_model": "aria_jax.checkpoints.safetensors",
        "LoadedModel": "aria_jax.checkpoints.models",
    },
    "What models do": {
        "embed": _API,
        "generate": _API,
        "score": _API,
        "Continuation": "aria_jax.generate.continuation",
        "Score": "aria_jax.generate.score",
    },
    "Performances and tokens": {
        "read_midi": _MIDI,
        "write_midi": _MIDI,
        "Performance": _MIDI,
        "tokenise": _API,
        "detokenise": _API,
        "Tokenizer": "data_pipeline.tokenizers",
        "augment": "data_pipeline.augment",
    },
    "Corpora": {
        "build": "data_pipeline.build",
        "inspect": "data_pipeline.inspection",
        "TokenShards": "data_pipeline.shards",
    },
    "Embeddings": {
        "Embeddings": "aria_jax.embed.table",
        "read_embeddings": "aria_jax.embed.table",
        "write_embeddings": "aria_jax.embed.table",
        "search": "aria_jax.embed.search",
        "probe": "aria_jax.eval.probe",
        "retrieval": "aria_jax.embed.search",
    },
    "Training": {
        "train": _API,
        "contrastive_loss": "aria_jax.losses.contrastive",
        "next_token_loss": "aria_jax.losses.cross_entropy",
        "build_model": "aria_jax.models.heads",
        "Model": "aria_jax.models.heads",
        "make_mesh": "aria_jax.sharding",
    },
    "Settings": {
        "for_task": "aria_jax.presets",
        "with_overrides": _CONFIG,
        "RunConfig": _CONFIG,
        "ModelConfig": _CONFIG,
        "ComputeConfig": _CONFIG,
        "MeshConfig": _CONFIG,
        "AugmentConfig": "data_pipeline.settings",
    },
    "Errors": {"UserError": _ERRORS, "InvalidMidi": _ERRORS},
}
"""Public name -> the module that defines it, by what it is for."""

PUBLIC = {name: module for names in SECTIONS.values() for name, module in names.items()}
__all__ = [*PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        import difflib

        near = difflib.get_close_matches(name, PUBLIC, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'aria_jax' has no attribute {name!r}{hint}")
    if name in ("train", "generate", "embed"):
        return importlib.import_module(f"aria_jax.{name}")  # the room, which can be called
    found = getattr(importlib.import_module(PUBLIC[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


class CallableRoom(types.ModuleType):
    """A package that is also the function of its name in `aria_jax.api`.

    Importing a package sets it as an attribute of its parent, over any function of that name.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__wrapped__(*args, **options)

    @property
    def __wrapped__(self) -> Any:
        return getattr(importlib.import_module(_API), self.__name__.rpartition(".")[2])


def make_callable(room: str) -> None:
    """Makes the package of that name callable."""
    sys.modules[room].__class__ = CallableRoom
