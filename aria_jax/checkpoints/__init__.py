"""Models on disk: Orbax checkpoints, safetensors under the published names; knows no training.

What is here needs no jax: it tells what is on the disk before the seconds that importing jax takes.
"""

import json
from pathlib import Path
from typing import Any

from aria_jax.checkpoints import hub
from data_pipeline import storage
from data_pipeline.artifact import file_digest, json_digest, rows_digest
from data_pipeline.errors import UserError

DIRECTORY = "checkpoints"
"""Of a workdir: one folder per step, named by its number."""


RELEASED = Path(__file__).parents[1] / "released"
"""Where weights that come with the package lie, NAME.safetensors."""
RELEASED_LM, RELEASED_ENCODER = "mini", "mini-embedding"
"""The language model and the encoder that verbs take unless another is named."""
RELEASED_NAMES = (RELEASED_LM, RELEASED_ENCODER)
"""Names that stand for such weights wherever a checkpoint is asked for."""


def model_path(source: str | Path) -> Path:
    """`source` itself; the file of released weights, where no such path is; that of hf://….

    Raises:
        UserError: such a name, but the installation has no such weights; as `hub.local`.
    """
    if hub.is_name(source):
        return hub.local(source)
    path = storage.local(source)
    if str(source) not in RELEASED_NAMES or path.exists():
        return path
    file = RELEASED / f"{source}.safetensors"
    if not file.is_file():
        raise UserError(
            f"{source}: the weights of that name are not part of this installation ({file} is "
            "missing); train them with `make train-mini`, or name a workdir of yours"
        )
    return file


def check_model(source: str | Path) -> None:
    """Raises `UserError` for what is no workdir with checkpoints, safetensors or name of some."""
    path = model_path(source)
    if path.suffix == ".safetensors" and path.is_file():
        return
    if not (path / DIRECTORY).is_dir():
        raise UserError(
            f"{source}: no checkpoint here (expected the --workdir of a training run, a "
            f".safetensors file, hf://OWNER/NAME, or {' or '.join(RELEASED_NAMES)})"
        )


def newest_step(workdir: str | Path) -> Path | None:
    """The folder of the newest complete checkpoint; None where there is none."""
    folder = storage.local(workdir) / DIRECTORY
    found = folder.iterdir() if folder.is_dir() else ()
    steps = [step for step in found if step.name.isdecimal() and (step / "record").is_dir()]
    if storage.is_remote(folder):
        steps = [step for step in steps if not storage.is_changed(step / storage.COMMITTED)]
    return max(steps, key=lambda step: int(step.name), default=None)


def newest_record(workdir: str | Path) -> dict[str, Any] | None:
    """The JSON record of the newest checkpoint; None where there is none that can be read."""
    step = newest_step(workdir)
    try:
        return None if step is None else json.loads((step / "record" / "metadata").read_text())
    except (OSError, ValueError):
        return None


def model_digest(source: str | Path) -> str:
    """Digest of a model: of a file's bytes, or of the newest checkpoint of a workdir.

    Of a checkpoint the record is read and every file is named with its size: Orbax names files of
    arrays at random, so that no two writes have the same. Any other name stands for itself.
    """
    path = model_path(source)
    if path.is_file():
        return file_digest(path)
    step = newest_step(path)
    if step is None:
        return json_digest(str(source))
    if storage.is_remote(step):
        sizes = {name: one.size for name, one in storage.listing(step).items()}
    else:
        files = (p for p in step.rglob("*") if p.is_file())
        sizes = {str(p.relative_to(step)): p.stat().st_size for p in files}
    record = step / "record" / "metadata"
    rows = sorted(sizes.items(), key=lambda row: Path(row[0]))
    return rows_digest([[step.name, file_digest(record)], *map(list, rows)])
