"""Every setting of a run as frozen, typed dataclasses (named runs: aria_jax/presets.py).

A run is one `RunConfig`. A field says what it may hold where it is defined; `RunConfig.problems()`
lists all that is wrong at once. `key=value` overrides name a field, with its section if need be.
"""

import dataclasses
import difflib
import typing
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from data_pipeline.errors import UserError
from data_pipeline.settings import AugmentConfig, Range, Setting, problems_of, settings_of
from data_pipeline.vocabulary import ids_in

SLICE_NOTES = 300
"""Notes of a slice when a whole file is embedded or classified (reference: aria/embedding.py)."""
SLICE_TOKENS = 2048
"""Where a slice is truncated, and the longest that slices are trained with (same reference)."""
CORPUS = ("corpus",)  # ModelConfig.vocabulary before the data was looked at
Head = Literal["lm", "embedding", "class", "none"]
Tracker = Literal["jsonl", "tensorboard", "wandb", "mlflow"]
Task = Literal["pretrain", "continue", "contrastive", "classify", "render"]
LoraTarget = Literal["qkv", "out", "gate", "up", "down", "head", "embedding"]

Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Momentum = Annotated[float, Range(0, 1, below=True)]
Devices = Annotated[int, Range(1, also=(-1,))]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: what a checkpoint fixes (reference: aria/model.py ModelConfig)."""

    d_model: Count = 1536
    """Width of the residual stream."""
    n_heads: Count = 24
    """Attention heads; each is d_model / n_heads wide."""
    n_layers: Count = 16
    """Transformer blocks."""
    ff_mult: Count = 4
    """Width of the feed-forward layers, in multiples of d_model."""
    max_seq_len: Annotated[int, Range(2)] = 8192
    """Tokens of the longest context."""
    vocab_size: Annotated[int, Range(2, 65_536)] = 17_727
    """Token ids; the tokenizer of the data decides."""
    vocabulary: tuple[str, ...] = ()
    """Ids that have weights, as ranges such as 0-5; all unless given. "corpus" takes those that the
    data can hold, however it is augmented; no other id has a probability."""
    head: Head = "lm"
    """What comes out, by the task: next-token logits, an embedding, class logits, hidden states."""
    emb_size: Count | None = None
    """Width of the embedding head, or of the conditioning vector when `head` is "lm"."""
    class_names: tuple[str, ...] = ()
    """Labels of the class head, in logit order; read from the data unless given."""
    resid_dropout: Momentum = 0.0
    """Residual dropout of the last layer; earlier layers ramp up to it linearly from 0."""
    learned_temperature: bool = False
    """Whether the contrastive temperature is a parameter; it starts at train.temperature."""

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def n_rows(self) -> int:
        """Ids that have weights: rows of the embedding, columns of the language head."""
        return len(ids_in(self.vocabulary)) or self.vocab_size


@dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed: changes speed and memory, not what is learned."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products (weights, softmax, losses stay float32); auto: bfloat16 but on CPUs."""
    remat: Literal["none", "dots", "full", "offload"] = "dots"
    """What the backward pass recomputes: nothing, all but matrix products and attention, or all;
    "offload" is "full" with the layers' inputs waiting in the host's memory."""
    scan_layers: bool = True
    """One compiled block for all layers compiles fast; False unrolls them, to count one's cost."""
    attention: Literal["auto", "packed", "splash", "cudnn", "triton", "blockwise", "plain"] = "auto"
    """Kernel of attention; "auto" takes the fastest for platform, dtype and length."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 (at most one) takes what the others leave."""

    data: Devices = -1
    """Devices that hold a copy of the weights each, and a part of the batch."""
    fsdp: Devices = 1
    """Devices that share one copy of weights and optimiser state, and the batch."""
    tensor: Devices = 1
    """Devices that share every matrix product: heads, feed-forward columns, vocabulary."""
    sequence: Devices = 1
    """Devices that share every sequence."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule, the reference's by default."""

    peak_lr: Positive = 3e-4
    """Learning rate at the end of the warm-up."""
    warmup_steps: Annotated[int, Range(0)] = 200
    """Steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """How the rate falls after the warm-up; "wsd" stays until the end nears (Hu et al. 2024)."""
    end_ratio: Annotated[float, Range(0, 1)] = 0.1
    """Last learning rate as a fraction of the peak."""
    decay_fraction: Annotated[float, Range(0, 1, above=True)] = 0.2
    """Share of the steps over which "wsd" decays."""
    ema_decay: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    """Of a moving average of the weights, which is then evaluated and exported."""
    b1: Momentum = 0.9
    """Decay of the first moment."""
    b2: Momentum = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-5
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, of every parameter."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradients; none does not clip."""


@dataclass(frozen=True)
class DataConfig:
    """What the loader delivers."""

    seq_len: Annotated[int, Range(2)] = 512
    """Tokens per training sequence."""
    global_batch: Count = 8
    """Sequences (contrastive: pairs) per optimiser step, over all devices and processes."""
    augment: bool = True
    """Whether training pieces are changed at random, as the section `augmentation` says."""
    packing: Literal["concat", "best-fit"] = "concat"
    """Windows of the concatenated pieces, or whole pieces packed into rows (pretrain, continue)."""
    max_piece_tokens: Count | None = None
    """Longer pieces are left out (pretrain, continue)."""
    min_slice_notes: Count = 100
    """Notes of the shortest random slice (contrastive, classify, render)."""
    max_slice_notes: Count = 650
    """Notes of the longest random slice (contrastive, classify, render)."""
    label: str | None = None
    """Which label `classify` learns."""
    sources: tuple[str, ...] = ()
    """Token shards where --data names none; several are mixed, FOLDER:0.7,FOLDER:0.3."""
    workers: Annotated[int, Range(0)] = 0
    """Loader processes; 0 reads in the training process."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Annotated[int, Range(0)] = 1000
    """Optimiser steps; 0 saves the weights the run would start from."""
    epochs: Positive | None = None
    """Passes over the training split instead of a number of steps, where given."""
    seed: Annotated[int, Range(0)] = 0
    """Of weights, order, augmentation and dropout."""
    ordered_start: bool = False
    """Whether near onsets, durations and pitches begin near each other (no --init-from)."""
    grad_accumulation: Count = 1
    """Parts a batch is computed in, one after the other; negatives still come from all of it."""
    eval_every: Count = 500
    """Steps between evaluations on the validation split."""
    eval_batches: Count = 16
    """Batches of an evaluation."""
    log_every: Count = 10
    """Steps between lines of metrics."""
    trackers: tuple[Tracker, ...] = ("jsonl", "tensorboard")
    """Where metrics go; wandb and mlflow are extras, and are told where by their own variables
    (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, …)."""
    stall_minutes: Positive | None = 10.0
    """Minutes without a step after which a process says where it is; none never does."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    checkpoint_every_minutes: Positive | None = 15.0
    """Minutes after the last checkpoint at which another is due; none for steps alone."""
    keep_checkpoints: Count = 3
    """How many of the last checkpoints stay."""
    profile_steps: str | None = None
    """First and last step of a trace for XProf and TensorBoard in WORKDIR/profile, e.g. 3-7."""
    max_bad_steps: Count = 10
    """Non-finite losses in a row after which to stop."""
    temperature: Positive = 0.1
    """Of the contrastive loss; where it is learned, the first one."""
    z_loss: NotNegative = 0.0
    """Weight of the squared log-normaliser in the next-token loss."""
    pooling: Literal["eos", "mean"] = "eos"
    """Where embedding and class heads read: at <E>, or the mean over all positions."""
    lora_rank: Annotated[int, Range(0)] = 0
    """Above 0, adapters of the weights of --init-from, and a new head, are all that is trained."""
    lora_alpha: Positive | None = None
    """Adapters count by lora_alpha / lora_rank; the rank by default."""
    lora_targets: tuple[LoraTarget, ...] = ("qkv", "out", "gate", "up", "down")
    """Matrices that get adapters; head and embedding can be named too."""

    @property
    def profile_range(self) -> tuple[int, int] | None:
        """First and last step to trace; None where `profile_steps` names none."""
        first, _, last = (self.profile_steps or "").partition("-")
        steps = (int(first), int(last)) if first.isdecimal() and last.isdecimal() else (0, 0)
        return steps if 1 <= steps[0] <= steps[1] else None


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
    hardness: NotNegative = 0.0
    """Above 0, negatives weigh exp(hardness * logit), normalised to mean one."""
    consecutive: bool = False
    """The second slice begins where the first ends, instead of anywhere."""
    composer_group: Count = 1
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
        """Everything in contradiction or out of its range, one sentence each."""
        wrong = out_of_range(self)
        if self.task not in typing.get_args(Task):
            wrong["task"] = f"task={self.task} must be one of {', '.join(typing.get_args(Task))}"
        return [*self._contradictions(wrong), *wrong.values()]

    def _contradictions(self, wrong: Container[str]) -> Iterator[str]:
        """What settings say wrongly together, where each of them is right by itself."""
        m, d, t = self.model, self.data, self.train

        def fine(*names: str) -> bool:
            return not any(name in wrong for name in names)

        if fine("model.d_model", "model.n_heads"):
            if m.d_model % m.n_heads:
                yield f"model.d_model={m.d_model} must divide by model.n_heads={m.n_heads}"
            if m.d_head % 2:
                yield f"rotary positions need an even head width, not {m.d_head}"
        if fine("data.seq_len", "model.max_seq_len") and d.seq_len > m.max_seq_len:
            yield f"data.seq_len={d.seq_len} exceeds model.max_seq_len={m.max_seq_len}"
        batch, parts = d.global_batch, t.grad_accumulation
        if fine("data.global_batch", "train.grad_accumulation") and batch % parts:
            yield f"data.global_batch={batch} must divide by train.grad_accumulation={parts}"
        least, most = d.min_slice_notes, d.max_slice_notes
        if fine("data.min_slice_notes", "data.max_slice_notes") and least > most:
            yield f"data.min_slice_notes={least} must be at most data.max_slice_notes={most}"
        if fine("model.vocabulary") and m.vocabulary not in ((), CORPUS):
            ids = ids_in(m.vocabulary)
            if not ids or ids != sorted(set(ids)) or ids[-1] >= m.vocab_size:
                yield f"model.vocabulary={m.vocabulary} must be corpus or ranges such as 0-5,17"
        if m.head == "embedding" and m.emb_size is None:
            yield "model.head=embedding needs model.emb_size"
        if m.learned_temperature and m.head != "embedding":
            yield "model.learned_temperature=true is for task contrastive"
        if (self.task == "classify") == (d.label is None):
            yield "task classify needs data.label=NAME (see `aria-jax data inspect`), no other does"
        if fine("train.profile_steps") and t.profile_steps and not t.profile_range:
            yield f"train.profile_steps={t.profile_steps} must be FIRST-LAST, such as 3-7"
        if t.lora_rank and not t.lora_targets:
            yield "train.lora_targets must name a matrix where train.lora_rank is above 0"
        if list(dataclasses.astuple(self.mesh)).count(-1) > 1:
            yield "at most one mesh axis may be -1"

    def validate(self) -> "RunConfig":
        """Returns itself, or raises one `UserError` naming every problem."""
        if found := self.problems():
            raise UserError("this run cannot work: " + "; ".join(found))
        return self


SECTIONS = {f.name: type(getattr(RunConfig(), f.name)) for f in dataclasses.fields(RunConfig)[1:]}
"""Class of each section of a run."""
SETTINGS: dict[str, Setting] = {
    f"{section}.{one.name}": one for section, cls in SECTIONS.items() for one in settings_of(cls)
}
"""Every setting by its full name."""


def out_of_range(config: RunConfig) -> dict[str, str]:
    """A sentence about each setting that holds what it may not, by its full name."""
    found: dict[str, str] = {}
    for section in SECTIONS:
        wrong = problems_of(getattr(config, section), f"{section}.")
        found |= {f"{section}.{name}": text for name, text in wrong.items()}
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types."""
    return dataclasses.asdict(config)


def full_name(key: str) -> str:
    """The full name of a setting that may be given without its section.

    Raises:
        UserError: unknown or ambiguous; the nearest names are told.
    """
    matches = [name for name in SETTINGS if name == key or name.partition(".")[2] == key]
    if len(matches) == 1:
        return matches[0]
    names = [*SETTINGS, *(name.partition(".")[2] for name in SETTINGS)]
    near = matches or difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    what = "is ambiguous" if matches else "is unknown"
    hint = f"nearest: {', '.join(near)}" if near else "`aria-jax train --settings` lists them all"
    raise UserError(f"setting {key!r} {what}; {hint}")


def with_settings(config: RunConfig, pairs: Iterable[tuple[str, Any]]) -> RunConfig:
    """Applies (name, value) pairs; text is read as the setting's type. Later ones win.

    A number of steps replaces a number of epochs that `config` asks for.

    Raises:
        UserError: unknown or ambiguous names and unusable values, all of them together.
    """
    given: dict[str, dict[str, Any]] = {}
    wrong = []
    for key, value in pairs:
        try:
            name = full_name(key)
            setting = SETTINGS[name]
            value = setting.read(value)
        except UserError as error:
            wrong.append(str(error))
        except ValueError as error:
            wrong.append(f"{name}={value} {error}")
        else:
            given.setdefault(name.partition(".")[0], {})[setting.name] = value
    train = given.get("train", {})
    if "steps" in train and "epochs" not in train:
        train["epochs"] = None
    for section, values in given.items():
        try:
            changed = dataclasses.replace(getattr(config, section), **values)
        except UserError as error:
            wrong.append(str(error))
        else:
            config = dataclasses.replace(config, **{section: changed})
    if wrong:
        raise UserError("; ".join([*wrong, *config.problems()]))
    return config


def with_overrides(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Applies `key=value` strings, e.g. `["steps=200", "optimizer.peak_lr=1e-4"]`.

    Raises:
        UserError: as `with_settings`; or a string that is no assignment.
    """
    pairs = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not of the form key=value")
        pairs.append((key, text))
    return with_settings(config, pairs)
