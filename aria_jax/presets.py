"""Settings by name and by file: the presets of `aria-jax train TASK --preset PRESET`, how hardware
computes one best (and what chips deliver by their data sheets), and what `--config FILE` reads.

Files are YAML or JSON with the keys of the command line: `steps: 200`, `optimizer.peak_lr: 1e-4`,
or a section with its settings inside; `task` may be named too. Every run writes its resolved
settings to WORKDIR/config.yaml; given to --config, they make the same run.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aria_jax.config import (
    CORPUS,
    SECTIONS,
    SETTINGS,
    SLICE_TOKENS,
    ComputeConfig,
    DataConfig,
    Head,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Task,
    TrainConfig,
    full_name,
    out_of_range,
    to_dict,
    with_settings,
)  # fmt: skip
from data_pipeline.errors import UserError, did_you_mean
from data_pipeline.settings import AugmentConfig, field_docs, text_of_settings

_MEDIUM = ModelConfig()

MODELS: dict[str, ModelConfig] = {
    # For a laptop: two hours of one core. Commands and scores of `pretrain` and
    # `contrastive` on 1,400 real performances are in docs/results.md (10 composers: 67.6 %, above
    # handcrafted statistics by 19 points). `make demo` and the tests use smaller batches of it.
    "tiny": ModelConfig(d_model=128, n_heads=4, n_layers=4, max_seq_len=2048, emb_size=None),
    # For weights that go with the package: made for GiantMIDI's 70 M tokens and 8 to 10 hours of
    # two quiet cores (`make train-mini`); the weights that come along had a third of an epoch
    # (released/mini.md). Only ids that solo piano can have get weights, 2,565 of 17,727: 3.35 M
    # parameters, 6.7 MB in bfloat16.
    "mini": ModelConfig(
        d_model=192, n_heads=6, n_layers=4, max_seq_len=1024, vocabulary=CORPUS, emb_size=None
    ),
    # For songs of several instruments: 400 steps took 28 minutes of two busy cores, from 19 songs;
    # commands and losses, from POP909's tracks to an accompaniment, are in docs/multitrack.md.
    "multitrack": ModelConfig(
        d_model=128, n_heads=4, n_layers=4, max_seq_len=1024, vocabulary=CORPUS, emb_size=None
    ),
    # For one GPU or a patient CPU: the paper's shape at a tenth of the size.
    "small": ModelConfig(d_model=512, n_heads=8, n_layers=8, max_seq_len=4096),
    # The paper's model, 0.65B parameters (section 3; reference: config/models/medium.json), with
    # the reference's settings of each stage. docs/tpu.md says what it takes on TPU pods.
    "medium": _MEDIUM,
}

# Slices that fill their rows; what is embedded with such a model is sliced the same way. Transposed
# slices cannot be paired by their key; touch and tempo, which tell who plays, are left alone
# (docs/results.md).
_SLICES: dict[str, Any] = {
    "data": DataConfig(seq_len=384, global_batch=32, min_slice_notes=100, max_slice_notes=127),
    "augmentation": AugmentConfig(tempo=0.0, velocity=0, mixup=False),
    "optimizer": OptimizerConfig(peak_lr=5e-4, warmup_steps=20),
}

RECIPES: dict[tuple[str, Task], dict[str, Any]] = {
    # Rates that suit so small a network.
    ("tiny", "pretrain"): {
        "data": DataConfig(seq_len=512, global_batch=16),
        "optimizer": OptimizerConfig(peak_lr=2e-3, warmup_steps=50),
    },
    # May be stopped at any step N: resumed with steps=N/0.8, the rate falls over the last fifth.
    # With 2,048 tokens a step the ordered start had a validation loss of 5.07 after 100 steps, a
    # random one 5.11 after 688 (one run each). With 4,096 and 3e-3, 6,000 steps took 2.4 h beside
    # other work (released/mini.md). 8,500 steps are one epoch.
    ("mini", "pretrain"): {
        "data": DataConfig(seq_len=1024, global_batch=8),
        "optimizer": OptimizerConfig(peak_lr=2e-3, warmup_steps=100, b2=0.98, schedule="wsd"),
        "train": TrainConfig(steps=8_500, eval_every=250, eval_batches=16, ordered_start=True),
    },
    # Teaches <D> and where pieces end.
    ("mini", "continue"): {
        "data": DataConfig(seq_len=1024, global_batch=8),
        "optimizer": OptimizerConfig(peak_lr=5e-4, warmup_steps=50, b2=0.98, end_ratio=0.02),
        "train": TrainConfig(steps=1_000, eval_every=100, eval_batches=16),
    },
    ("mini", "contrastive"): {
        **_SLICES,
        "optimizer": OptimizerConfig(peak_lr=5e-4, warmup_steps=20, end_ratio=0.02),
        "train": TrainConfig(steps=1_500, eval_every=100, eval_batches=4),
    },
    ("tiny", "contrastive"): _SLICES,
    # May be stopped at any step, as `mini`.
    ("multitrack", "pretrain"): {
        "data": DataConfig(seq_len=512, global_batch=8),
        "augmentation": AugmentConfig(instrument_velocity=1, instrument_drop=0.2),
        "optimizer": OptimizerConfig(peak_lr=2e-3, warmup_steps=50, b2=0.98, schedule="wsd"),
        "train": TrainConfig(steps=2_000, eval_every=100, ordered_start=True),
    },
    ("multitrack", "contrastive"): {
        **_SLICES,
        "augmentation": AugmentConfig(tempo=0.0, velocity=0, mixup=False, instrument_drop=0.2),
        "train": TrainConfig(steps=200, eval_every=50, eval_batches=4),
    },
}
"""Sections of a run that a preset sets otherwise than the reference."""


TOKENS_AT_ONCE = {
    "v5p": 65_536, "v6e": 32_768, "v5e": 16_384,
    "b200": 131_072, "h200": 131_072, "h100": 65_536, "a100": 65_536, "rtx4090": 8_192, "l4": 8_192,
}  # fmt: skip
"""Tokens of `medium` whose activations fit into a chip with remat "dots", the fastest that fits;
a power of two of the rows of 8,192."""
MAX_SHARDED = 64
"""TPUs that share one copy of the weights; more of them hold further copies."""
GPUS_OF_A_HOST = 8
"""GPUs that NVLink joins, which share one copy of the weights."""
MAX_UNROLLED_LAYERS = 32
"""On GPUs; unrolled, the 16 of `medium` take nearly twice as long to compile as a loop."""


def for_task(preset: str, task: Task) -> RunConfig:
    """The run that `aria-jax train TASK --preset PRESET` starts, before overrides.

    Model sizes are in `MODELS`; everything that depends on the task (head, peak learning rate,
    warm-up, sequence length) follows the reference's training scripts, or `RECIPES`.
    """
    if preset not in MODELS:
        hint = did_you_mean(preset, MODELS)
        raise UserError(f"no preset {preset!r}{hint} The presets are {', '.join(MODELS)}.")
    run = _as_the_reference(preset, task)
    return dataclasses.replace(run, **RECIPES.get((preset, task), {}))


def _as_the_reference(preset: str, task: Task) -> RunConfig:
    model = MODELS[preset]
    small_batch = preset in ("tiny", "mini", "multitrack", "small")
    run = RunConfig(task=task, model=model)
    if task in ("pretrain", "continue", "render"):
        seq_len = {"tiny": 256, "small": 1024}.get(preset, model.max_seq_len)
        # As in the paper: one epoch of pieces short enough to be seen with their end.
        finetuned = task == "continue"
        # About seven tokens for a note of a score and of its performance.
        notes = (seq_len // 16, seq_len // 8) if task == "render" else (100, 650)
        return dataclasses.replace(
            run,
            data=DataConfig(
                seq_len=seq_len,
                global_batch=8 if small_batch else 512,
                max_piece_tokens=model.max_seq_len if finetuned else None,
                min_slice_notes=notes[0],
                max_slice_notes=notes[1],
            ),
            optimizer=OptimizerConfig(peak_lr=1e-3 if preset == "tiny" else 3e-4),
            train=TrainConfig(epochs=1.0 if finetuned else None),
        )
    head: Head = "embedding" if task == "contrastive" else "class"
    return dataclasses.replace(
        run,
        model=dataclasses.replace(
            model,
            head=head,
            emb_size=512 if head == "embedding" else None,
            resid_dropout=0.2 if head == "class" else 0.0,
        ),
        data=DataConfig(
            seq_len=512 if preset == "tiny" else min(SLICE_TOKENS, model.max_seq_len),
            global_batch=16 if small_batch else 128,
        ),
        optimizer=OptimizerConfig(peak_lr=3e-4 if preset == "tiny" else 1e-5, warmup_steps=100),
    )


GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of a data sheet.

    Attributes:
        flops: dense bfloat16 FLOP/s at peak.
        hbm: bytes of device memory.
        bandwidth: bytes a second to and from it.
        network: bytes a second in and out over all links to other chips of the slice.
        kinds: parts of jax's `device_kind` that tell it.
        matrix_unit: rows and columns of a TPU's systolic array.
        clock: cycles a second of a TPU's core, from which its peak follows.
    """

    flops: float
    hbm: float
    bandwidth: float
    network: float
    kinds: tuple[str, ...]
    matrix_unit: int = 128
    clock: float = 1.0

    @property
    def platform(self) -> Literal["gpu", "tpu"]:
        """What jax calls such devices."""
        return "tpu" if self.kinds[0].startswith("TPU") else "gpu"


# TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e. GPUs: NVIDIA data sheets, SXM modules,
# without sparsity; memory as the driver reports it, which the sheets round; `network` is NVLink or,
# for cards, PCIe. The first whose kind matches is taken: "TPU v5" would match "TPU v5 lite" too.
CHIPS = {
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, ("TPU v6",), matrix_unit=256, clock=1.75e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, ("TPU v5 lite", "TPU v5e"), clock=1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, ("TPU v5",), clock=1.75e9),
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, ("TPU v4",)),
    "b200": Chip(2250e12, 191_514_411_008, 7672e9, 1800e9, ("B200",)),
    "h200": Chip(989e12, 151_397_597_184, 4800e9, 900e9, ("H200",)),
    "h100": Chip(989e12, 84_978_434_048, 3352e9, 900e9, ("H100",)),
    "a100": Chip(312e12, 85_100_068_864, 2039e9, 600e9, ("A100",)),
    "l4": Chip(121e12, 22 * GIB, 300e9, 64e9, ("L4",)),
    "rtx4090": Chip(165e12, 23.6 * GIB, 1008e9, 64e9, ("RTX 4090",)),
}


def chip_of(device_kind: str) -> Chip | None:
    """The data sheet of a device; None for CPUs and devices not in the table."""
    for chip in CHIPS.values():  # an L40 is no L4
        if any(re.search(rf"{kind}(?![0-9])", device_kind) for kind in chip.kinds):
            return chip
    return None


def for_hardware(
    run: RunConfig, family: str, chips: int, *, per_host: int | None = None
) -> RunConfig:
    """`run` as it is best computed on so many chips of a family (docs/tpu.md, docs/gpu.md).

    Only memory and speed are settled here: the mesh, the number type, what is recomputed, and in
    how many parts a batch is worked through. What is learned is the preset's.
    On GPUs layers are unrolled: a loop over them copies what it keeps for the backward pass.
    A batch too large for the chips' memory is worked through in several parts; where even one row
    is too large, everything is recomputed.

    Args:
        per_host: GPUs of one host, 8 by default; between hosts only gradients travel.
    """
    m, medium = run.model, for_task("medium", "pretrain").model
    on_tpu = CHIPS[family].platform == "tpu"
    sharded = math.gcd(chips, MAX_SHARDED if on_tpu else per_host or GPUS_OF_A_HOST)
    rows = max(run.data.global_batch // chips, 1)
    views = 2 if run.task == "contrastive" else 1
    size = (m.d_model * m.n_layers) / (medium.d_model * medium.n_layers)
    at_once = TOKENS_AT_ONCE[family] / size / (run.data.seq_len * views)  # rows
    parts = next((n for n in _divisors(rows) if rows / n <= at_once), rows)
    return dataclasses.replace(
        run,
        compute=ComputeConfig(
            dtype="bfloat16",
            remat="dots" if rows / parts <= at_once else "full",
            scan_layers=on_tpu or m.n_layers > MAX_UNROLLED_LAYERS,
        ),
        mesh=MeshConfig(data=chips // sharded, fsdp=sharded),
        train=dataclasses.replace(run.train, grad_accumulation=parts),
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


CONFIG_FILE = "config.yaml"
SUFFIXES = (".yaml", ".yml", ".json")


def with_config_file(config: RunConfig, path: str | Path) -> RunConfig:
    """`config` with the settings of a file, which must be of its task.

    Raises:
        UserError: no such file, neither YAML nor JSON, another task, a setting given twice;
            unknown settings and unusable values, all of them together.
    """
    try:
        pairs = list(_pairs(_read(Path(path))))
        tasks = [value for key, value in pairs if key == "task"]
        if tasks and tasks[0] != config.task:
            raise UserError(f"these are settings of task {tasks[0]}, not {config.task}")
        settings = [(key, value) for key, value in pairs if key != "task"]
        changed = with_settings(config, settings)
        names = [full_name(key) for key, _ in settings]
        _refuse_twice(names)
        if wrong := [text for name, text in out_of_range(changed).items() if name in names]:
            raise UserError("; ".join(wrong))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return changed


def write_config(config: RunConfig, workdir: str | Path) -> Path:
    """Writes every setting of a run to WORKDIR/config.yaml, all or nothing."""
    import yaml

    from data_pipeline.artifact import write_atomically

    values = json.loads(json.dumps(to_dict(config)))  # tuples as lists
    path = Path(workdir) / CONFIG_FILE
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
    return path


def _read(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML or JSON file."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML would silently keep the last of two equal keys."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            _refuse_twice(str(key.value) for key, _ in node.value)
            return super().construct_mapping(node, deep)

    def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice(key for key, _ in pairs)
        return dict(pairs)

    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"expected a file of settings that ends in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=json_object)
        else:
            values = yaml.load(text, Loader)
    except FileNotFoundError:
        raise UserError("no such file") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"not {path.suffix[1:].upper()} ({reason[:200]})") from None
    if not isinstance(values, Mapping):
        raise UserError("expected settings by name, e.g. `steps: 200`")
    return values


def _refuse_twice(keys: Iterable[str]) -> None:
    if twice := [key for key, n in Counter(keys).items() if n > 1]:
        raise UserError(f"{', '.join(twice)}: given twice")


def _pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting, sections opened."""
    for key, value in values.items():
        if not isinstance(value, Mapping):
            yield str(key), value
        elif key in SECTIONS:
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            raise UserError(f"{key!r} is no section; the sections are {', '.join(SECTIONS)}")


def listed(preset: RunConfig | None = None) -> list[dict[str, Any]]:
    """Name, type, range, default and docstring of every setting, as JSON types.

    Args:
        preset: a run whose values are listed too, as "preset".
    """
    rows = []
    for section, cls in SECTIONS.items():
        docs = field_docs(cls)
        for name, setting in SETTINGS.items():
            if name.startswith(f"{section}."):
                row = {
                    "name": name,
                    "type": setting.type_name,
                    "range": None if setting.range is None else f"must {setting.range}",
                    "default": setting.default,
                    "doc": docs[setting.name],
                }
                if preset is not None:
                    row["preset"] = getattr(getattr(preset, section), setting.name)
                rows.append(row)
    return rows


def settings_text(rows: Sequence[Mapping[str, Any]], preset: str) -> str:
    """What `listed` found, grouped by section, for a person."""
    return text_of_settings(SECTIONS, rows, preset)
