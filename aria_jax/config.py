"""Every setting of a run as frozen, typed dataclasses (named runs: aria_jax/presets.py).

A run is one `RunConfig`. `key=value` overrides name a field, with its section where two sections
share the name (`optimizer.peak_lr=1e-4`, `steps=200`). `RunConfig.problems()` lists all that is
wrong at once, before any slow work.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipeline.augment_config import AugmentConfig
from data_pipeline.errors import UserError

SLICE_NOTES = 300
"""Notes of a slice when a whole file is embedded or classified (reference: aria/embedding.py)."""
SLICE_TOKENS = 2048
"""Where a slice is cut off, and the longest that slices are trained with (same reference)."""

Head = Literal["lm", "embedding", "class", "none"]
Task = Literal["pretrain", "continue", "contrastive", "classify"]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: what a checkpoint fixes (reference: aria/model.py ModelConfig)."""

    d_model: int = 1536
    n_heads: int = 24
    n_layers: int = 16
    ff_mult: int = 4
    max_seq_len: int = 8192
    vocab_size: int = 17_727
    head: Head = "lm"
    emb_size: int | None = None
    """Width of the embedding head, or of the conditioning vector when `head` is "lm"."""
    class_names: tuple[str, ...] = ()
    """Labels of the class head, in logit order."""
    resid_dropout: float = 0.0
    """Residual dropout of the last layer; earlier layers ramp up to it linearly from 0."""
    learned_temperature: bool = False
    """Whether the contrastive temperature is a parameter; it starts at train.temperature."""

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def n_params(self) -> int:
        """Number of parameters, head included."""
        d, ff = self.d_model, self.d_model * self.ff_mult
        block = 4 * d * d + 3 * d * ff + 4 * d
        head = {
            "lm": d * self.vocab_size + (self.emb_size or 0) * d,
            "embedding": d * (self.emb_size or 0) + self.learned_temperature,
            "class": d * len(self.class_names),
            "none": 0,
        }[self.head]
        return self.vocab_size * d + self.n_layers * block + 2 * d + head


@dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed: changes speed and memory, not what is learned."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matrix products; parameters, softmax and losses stay float32."""
    remat: Literal["none", "dots", "full", "offload"] = "dots"
    """What the backward pass recomputes: nothing, all but matrix products and attention, or
    everything; "offload" is "full" with the layers' inputs waiting in the host's memory."""
    scan_layers: bool = True
    """One compiled block for all layers compiles fast; False unrolls them, to count one's cost."""
    attention: Literal["auto", "packed", "splash", "cudnn", "blockwise", "plain"] = "auto"
    """Kernel of attention; "auto" takes the fastest for platform, dtype and length."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 (at most one) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule, the reference's by default."""

    peak_lr: float = 3e-4
    warmup_steps: int = 200
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    end_ratio: float = 0.1
    """Last learning rate as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Share of the steps over which "wsd" decays."""
    ema_decay: float | None = None
    """Keeps an exponential moving average of the weights, which is evaluated and exported."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What the loader delivers."""

    seq_len: int = 512
    """Tokens per training sequence."""
    global_batch: int = 8
    """Sequences (contrastive: pairs) per optimiser step, over all devices and processes."""
    augment: bool = True
    """Whether training pieces are changed at random, as the section `augmentation` says."""
    packing: Literal["concat", "best-fit"] = "concat"
    max_piece_tokens: int | None = None
    """Longer pieces are left out (pretrain, continue)."""
    min_slice_notes: int = 100
    max_slice_notes: int = 650
    label: str | None = None
    """Which label `classify` learns."""
    workers: int = 0
    """Loader processes; 0 reads in the training process."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    epochs: float | None = None
    """Passes over the training split instead of a number of steps, where given."""
    seed: int = 0
    grad_accumulation: int = 1
    """Parts a batch is computed in, one after the other; the contrastive task caches gradients, so
    that negatives still come from the whole batch."""
    eval_every: int = 500
    eval_batches: int = 16
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    max_bad_steps: int = 10
    """Stop after this many non-finite losses in a row."""
    temperature: float = 0.1
    """Of the contrastive loss; where it is learned, the first one."""
    z_loss: float = 0.0
    pooling: Literal["eos", "mean"] = "eos"
    lora_rank: int = 0
    """Above 0, low-rank adapters of the weights given by --init-from are trained, not the weights
    (arXiv 2106.09685); a new head is trained whole."""
    lora_alpha: float | None = None
    """Adapters count by lora_alpha / lora_rank; the rank by default."""
    lora_targets: tuple[str, ...] = ("qkv", "out", "gate", "up", "down")
    """Matrices that get adapters; head and embedding can be named too."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """Which pairs the contrastive task compares, and how.

    The reference's released code compares within each process (`negatives="local"`) and never
    augments (`data.augment=false`); the paper describes augmentation.
    """

    variant: Literal["symmetric", "nt-xent"] = "symmetric"
    """Anchors against the other view (the reference), or against all other views (SimCLR)."""
    negatives: Literal["global", "local"] = "global"
    """Pieces of the whole batch, or only of those on the same device."""
    mask_composition: bool = True
    """Performances of one composition are no negatives of each other."""
    hardness: float = 0.0
    """Above 0, negatives weigh exp(hardness * logit), normalised to mean one."""
    consecutive: bool = False
    """The second slice begins where the first ends, instead of anywhere."""
    composer_group: int = 1
    """Up to that many pieces of one composer next to each other in a batch: hard negatives."""


@dataclass(frozen=True)
class RunConfig:
    """All there is to say about a run; saved as JSON inside every checkpoint."""

    task: Task = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)

    def problems(self) -> list[str]:
        """Everything that contradicts itself, one sentence each."""
        m, d, t, found = self.model, self.data, self.train, []
        if m.d_model % m.n_heads:
            found.append(f"model.d_model={m.d_model} must divide by model.n_heads={m.n_heads}")
        if m.d_head % 2:
            found.append(f"rotary positions need an even head width, not {m.d_head}")
        if d.seq_len > m.max_seq_len:
            found.append(f"data.seq_len={d.seq_len} exceeds model.max_seq_len={m.max_seq_len}")
        if d.global_batch % t.grad_accumulation:
            found.append(
                f"data.global_batch={d.global_batch} must divide by "
                f"train.grad_accumulation={t.grad_accumulation}"
            )
        if m.head == "embedding" and not m.emb_size:
            found.append("model.head=embedding needs model.emb_size")
        if m.learned_temperature and m.head != "embedding":
            found.append("model.learned_temperature=true is for task contrastive")
        if self.contrastive.hardness < 0:
            found.append(f"contrastive.hardness={self.contrastive.hardness} must not be negative")
        if t.steps < 0:
            found.append(f"train.steps={t.steps} must not be negative")
        if t.lora_rank < 0:
            found.append(f"train.lora_rank={t.lora_rank} must not be negative; 0 trains everything")
        if self.task == "classify" and not d.label:
            found.append("task classify needs data.label=NAME (see `aria-jax data inspect`)")
        if not 0 < d.min_slice_notes <= d.max_slice_notes:
            found.append("data.min_slice_notes must be positive and at most data.max_slice_notes")
        positive = {
            "data.seq_len": d.seq_len,
            "data.global_batch": d.global_batch,
            "train.grad_accumulation": t.grad_accumulation,
            "train.temperature": t.temperature,
            "train.epochs": 1 if t.epochs is None else t.epochs,
            "train.lora_alpha": 1 if t.lora_alpha is None else t.lora_alpha,
            "data.max_piece_tokens": 1 if d.max_piece_tokens is None else d.max_piece_tokens,
            "contrastive.composer_group": self.contrastive.composer_group,
            "optimizer.peak_lr": self.optimizer.peak_lr,
        }
        found += [
            f"{name}={value} must be positive" for name, value in positive.items() if value <= 0
        ]
        if list(dataclasses.astuple(self.mesh)).count(-1) > 1:
            found.append("at most one mesh axis may be -1")
        return found

    def validate(self) -> "RunConfig":
        """Returns itself, or raises one `UserError` naming every problem."""
        if found := self.problems():
            raise UserError("this run cannot work: " + "; ".join(found))
        return self


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`; unknown keys raise `UserError` (a newer version wrote them)."""
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise UserError(
            f"{cls.__name__} has no {', '.join(sorted(unknown))}: "
            "was this file written by a newer aria_jax?"
        )
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(typing.cast(type, hints[name]), value)
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made)


def with_overrides(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Applies `key=value` strings, e.g. `["steps=200", "optimizer.peak_lr=1e-4"]`.

    A number of steps replaces a number of epochs that the preset asks for.

    Raises:
        UserError: unknown or ambiguous key (the nearest valid ones are named), or a value of the
            wrong type.
    """
    known = {
        f"{section.name}.{f.name}": typing.get_type_hints(type(getattr(config, section.name)))[
            f.name
        ]
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, section.name))
        for f in dataclasses.fields(getattr(config, section.name))
    }
    given = set()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not of the form key=value")
        matches = [k for k in known if k == key or k.split(".")[1] == key]
        if len(matches) != 1:
            names = [*known, *(k.split(".")[1] for k in known)]
            near = matches or difflib.get_close_matches(key, names, n=3, cutoff=0.5)
            what = "is ambiguous" if matches else "is unknown"
            raise UserError(
                f"setting {key!r} {what}; nearest: {', '.join(near) or ', '.join(known)}"
            )
        given.add(matches[0])
        section, name = matches[0].split(".")
        value = _parse(text, known[matches[0]], matches[0])
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    if "train.steps" in given and "train.epochs" not in given:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=None))
    return config


def _parse(text: str, hint: Any, key: str) -> Any:
    """`text` as the type `hint`: int, float, bool, str, Literal, tuple, or one of them | None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _parse(text, next(a for a in arguments if a is not type(None)), key)
    if origin is Literal:
        if text not in arguments:
            raise UserError(f"{key}={text} must be one of {', '.join(map(str, arguments))}")
        return text
    if origin is tuple:
        return tuple(part for part in text.split(",") if part)
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{key}={text} must be true or false")
        return text.lower() in ("true", "1")
    try:
        if hint is int:
            return int(text.replace("_", "")) if "e" not in text else int(float(text))
        return hint(text)
    except ValueError:
        raise UserError(f"{key}={text} must be of type {hint.__name__}") from None
