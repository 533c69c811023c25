"""Weights by name: hf://OWNER/NAME[@REVISION], model.safetensors of a repository on a hub.

huggingface_hub asks the hub ($HF_ENDPOINT, $HF_TOKEN) and keeps files in its own cache ($HF_HOME),
which other programs share. Nothing but safetensors and JSON is ever asked for: no pickle. Each
process looks once which commit a name stands for, and once whether the file here is what its digest
in the cache says. Where the hub does not answer, the cache is taken, with a warning.

Also what a repository says of a model beside its weights: config.json and the card.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aria_jax.config import ModelConfig
from data_pipeline import errors
from data_pipeline.errors import UserError

FILE, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
CODE = "loubb/aria-medium-base"
"""Repository with the network's published code for transformers; see `hub_config`."""
_NAME = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@(\S+))?")  # `Path` makes one slash of two
_COMMIT = re.compile(r"[0-9a-f]{40}")
_found: dict[str, Path] = {}


def is_name(source: object) -> bool:
    """Whether this begins as a name of the hub does."""
    return isinstance(source, str | Path) and str(source).startswith("hf:/")


def written(name: str | Path) -> str:
    """The name as it is written, also of a `Path` of it.

    Raises:
        UserError: hf:// followed by something else than OWNER/NAME or OWNER/NAME@REVISION.
    """
    repo, revision = _parsed(name)
    return f"hf://{repo}" + (f"@{revision}" if revision else "")


def pinned(name: str | Path) -> str:
    """The name with the commit that it stands for, which is the same weights at any time."""
    return f"hf://{_parsed(name)[0]}@{local(name).parent.name}"


def local(name: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The file of a name on this disk, brought there if need be.

    Args:
        progress: told of bytes of a download; without it huggingface_hub shows its own bar.

    Raises:
        UserError: no such repository or revision, or no right to see it; no safetensors there;
            the hub does not answer and the cache has no such file; other bytes than promised.
    """
    if (key := written(name)) not in _found:
        file = _brought(key, *_parsed(key), progress)
        _check_digest(key, file)
        _found[key] = file
        errors.SHOWN_AS[str(file)] = f"hf://{_parsed(key)[0]}@{file.parent.name}"
    return _found[key]


def _parsed(name: str | Path) -> tuple[str, str | None]:
    found = _NAME.fullmatch(str(name))
    if found is None:
        raise UserError(f"{name}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return found[1], found[2]


def _brought(
    name: str, repo: str, revision: str | None, progress: Callable[[int, int], None] | None
) -> Path:
    """Asks the hub which commit that is, and downloads what of it is not here."""
    try:
        import huggingface_hub as hf
        from huggingface_hub import constants
        from huggingface_hub.errors import (
            GatedRepoError,
            HTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise UserError(
            f"{name}: weights of a hub need another package: pip install 'aria-jax[hub]' ({error})"
        ) from None
    kept = hf.try_to_load_from_cache(repo, FILE, revision=revision)
    here = Path(kept) if isinstance(kept, str) else None
    if here is not None and _COMMIT.fullmatch(revision or ""):
        return here
    try:
        listed = hf.HfApi().model_info(repo, revision=revision).siblings
        names = [each.rfilename for each in listed or ()]
        if FILE not in names:
            raise UserError(f"{name}: {_without_weights(names)}")
        for file in [each for each in (CONFIG, FILE) if each in names]:
            kind = _bar(progress) if file == FILE and progress is not None else None
            path = hf.hf_hub_download(repo, file, revision=revision, tqdm_class=kind)
        return Path(path)
    except GatedRepoError:
        raise UserError(
            f"{name}: its owner lets in only those who asked: ask at {constants.ENDPOINT}/"
            f"{repo}, then log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: the hub has no such repository, or hides it: correct the name, or log in "
            "with `hf auth login` (or HF_TOKEN) as someone who may see it"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the repository has no branch, tag or commit {revision}") from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno and error.filename:
            raise  # of this disk
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        if here is None:
            raise UserError(
                f"{name}: it is not whole on this disk, and the hub does not give it ({reason}); "
                "run the same command again when there is a connection"
            ) from error
        warnings.warn(
            f"{name}: the hub does not answer ({reason}); taking commit {here.parent.name[:12]} "
            "from the cache",
            stacklevel=2,
        )
        return here


def _without_weights(names: Iterable[str]) -> str:
    """Why a repository of such files gives nothing to load."""
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack"))]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        shown = ", ".join(sorted(others)[:3])
        return f"no {FILE} there, only {shown}; download that file, and name it as a path"
    if pickles:
        return (
            f"no {FILE} there, only {', '.join(sorted(pickles)[:3])}: pickles can run code and are "
            "never read; ask its owner for safetensors"
        )
    return f"no {FILE} there: this repository holds no weights of a model"


def _bar(progress: Callable[[int, int], None]) -> type:
    """What huggingface_hub takes for a progress bar, and tells `progress` instead."""
    from tqdm import tqdm

    class Told(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            progress(int(self.n), int(self.total or self.n))

        def update_transfer(self, n: float) -> None:
            """The same bytes, counted on the network."""

    return Told


def _check_digest(name: str, file: Path) -> None:
    """Raises `UserError`, and removes the file, unless it is what its name in the cache promises.

    That name is what the hub calls the file: the sha256 of a large one, git's sha1 of a small one.
    Where the cache has no such names (systems without links), there is nothing to compare.
    """
    blob = file.parent / os.readlink(file) if file.is_symlink() else file
    digest = {64: hashlib.sha256(), 40: hashlib.sha1(usedforsecurity=False)}.get(len(blob.name))
    if digest is None or not re.fullmatch(r"[0-9a-f]+", blob.name):
        return
    if digest.name == "sha1":
        digest.update(b"blob %d\0" % blob.stat().st_size)
    with blob.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != blob.name:
        for path in (blob.resolve(), blob, file):
            path.unlink(missing_ok=True)
        raise UserError(
            f"{name}: the file has other bytes ({digest.name} {digest.hexdigest()[:12]}…) than the "
            f"hub promises ({blob.name[:12]}…), and was removed; run the same command again. If it "
            "happens again, something between here and the hub changes files"
        )


# --- what stands beside the weights --------------------------------------------------------------


def hub_config(config: ModelConfig, *, eos_id: int, pad_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a repository.

    Its keys are those of the published repositories. "reference" holds what the reference's own
    ModelConfig takes. A language model names the published code, which transformers loads with
    trust_remote_code=True; for other heads there is none.
    """
    said: dict[str, Any] = {
        "model_type": "aria",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_model * config.ff_mult,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_seq_len": config.max_seq_len,
        "embedding_size": config.emb_size,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "reference": _reference_config(config),
    }
    if config.head == "lm" and config.emb_size is None:
        classes = {
            "AutoConfig": "configuration_aria.AriaConfig",
            "AutoModel": "modeling_aria.AriaModel",
            "AutoModelForCausalLM": "modeling_aria.AriaForCausalLM",
        }
        said["architectures"] = ["AriaForCausalLM"]
        said["auto_map"] = {auto: f"{CODE}--{name}" for auto, name in classes.items()}
    if config.class_names:
        said["id2label"] = dict(enumerate(config.class_names))
        said["label2id"] = {name: i for i, name in enumerate(config.class_names)}
    return said


def _reference_config(config: ModelConfig) -> dict[str, Any]:
    """Arguments of the reference's ModelConfig (reference: aria/model.py, config/models)."""
    sizes = ("d_model", "n_heads", "n_layers", "ff_mult", "max_seq_len", "vocab_size")
    found = {name: getattr(config, name) for name in sizes}
    found |= {"drop_p": config.resid_dropout, "grad_checkpoint": False}
    if config.emb_size is not None:
        found["emb_size"] = config.emb_size
    if config.class_names:
        found["class_size"] = len(config.class_names)
        found["tag_to_id"] = {name: i for i, name in enumerate(config.class_names)}
    return found


def config_beside(file: Path) -> dict[str, Any]:
    """What config.json says of the model.safetensors beside it that tensors do not show, by the
    names of `ModelConfig`; nothing where there is none.
    """
    try:
        said = json.loads((file.parent / CONFIG).read_text("utf-8")) if file.name == FILE else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(said, dict):
        return {}
    known = {"n_heads": said.get("num_attention_heads"), "max_seq_len": said.get("max_seq_len")}
    found: dict[str, Any] = {name: n for name, n in known.items() if isinstance(n, int) and n > 0}
    if isinstance(labels := said.get("id2label"), dict):
        found["class_names"] = [str(labels[key]) for key in sorted(labels, key=int)]
    return found


_CARD = """\
---
library_name: aria_jax
tags:
- midi
- music
- symbolic-music
---
# {title}

{what}: width {config.d_model}, {config.n_heads} heads, {config.n_layers} layers, {n_parameters:,} \
parameters, {config.max_seq_len:,} tokens of context, {config.vocab_size:,} token ids.
Trained for {step:,} steps; tokenizer {tokenizer}; its MIDI files were read by {reading}.

## Use

    pip install 'aria-jax[hub]'
    {use}

The weights have the names of EleutherAI/aria, whose PyTorch network loads them:

```python
import json
from aria.model import ModelConfig, {network}
from safetensors.torch import load_file

model = {network}(ModelConfig(**json.load(open("config.json"))["reference"]))
model.load_state_dict(load_file("model.safetensors"))
```
{transformers}
## Before this is published

Say what it was trained on and what it cannot do, and add its licence (`license:`) at the top.
"""
_TRANSFORMERS = f"""
transformers loads them by `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`, \
which runs the code of {CODE}.
"""


def card(title: str, config: ModelConfig, n_parameters: int, about: dict[str, Any]) -> str:
    """README.md of a repository.

    Args:
        about: "step", "tokenizer" and "reading" of the model.
    """
    name = f"hf://OWNER/{title}"
    what, network, use = {
        "lm": ("A language model of piano performances", "TransformerLM",
               f"aria-jax generate --checkpoint {name} --prompt some.mid --out out"),
        "embedding": ("Embeds piano performances", "TransformerEMB",
                      f"aria-jax embed my_midis emb.parquet --checkpoint {name}"),
        "class": (f"Classifies piano performances ({', '.join(config.class_names)})",
                  "TransformerCL", f"aria-jax classify my_midis --checkpoint {name}"),
    }[config.head]  # fmt: skip
    if config.head == "lm" and config.emb_size is not None:
        network = "TransformerLM_CND"
    plain = config.head == "lm" and config.emb_size is None
    values = {name: about[name] for name in ("step", "tokenizer", "reading")}
    return _CARD.format(
        title=title,
        what=what,
        config=config,
        n_parameters=n_parameters,
        network=network,
        use=use,
        transformers=_TRANSFORMERS if plain else "",
        **values,
    )
