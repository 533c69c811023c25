"""`tokenizers compare --train`: one small network for every scheme, at equal compute; and the page.

Each scheme gets shards of its own of the same files, with the same split. The budget is what STEPS
steps of the first scheme take, in FLOPs; the others get as many steps as that allows. What is done
is kept in OUT, scheme by scheme and seed by seed, so that an interrupted study goes on.
"""

import html
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.artifact import Identity, write_atomically
from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import Performance, read_midi
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.tokenizers.comparison import SchemeReport, heard
from data_pipeline.vocabulary import Kind

if TYPE_CHECKING:
    from aria_jax.checkpoints.models import LoadedModel
    from aria_jax.config import RunConfig

CLIP_S = 30
"""Of each held-out piece, that is scored: the same music for every scheme."""
N_PROMPTS, PROMPT_TOKENS, N_SAMPLES, SAMPLE_TOKENS = 8, 100, 4, 128
"""Held-out pieces that free samples go on from, and how many samples of each."""
NETWORK = ("d_model=64", "n_heads=2", "n_layers=2", "vocabulary=corpus")
PRETRAIN = ("seq_len=256", "global_batch=8", "peak_lr=2e-3", "eval_batches=8")
CONTRASTIVE = (
    "seq_len=256", "global_batch=16", "peak_lr=5e-4", "min_slice_notes=60", "max_slice_notes=85",
)  # fmt: skip
CONTRASTIVE_SHARE = 0.06
"""Steps of contrastive training for each of pretraining."""
BAR_S = 2.0
"""Of music, whose tokens the page shows."""


@dataclass(frozen=True)
class Trained:
    """What one network has learnt.

    Attributes:
        steps: of pretraining, and gflops that they took by formula.
        nats_per_note, nats_per_s: of held-out music, all tokens of it; notes and seconds are those
            of the files, so that vocabularies can be compared.
        valid_percent: free samples, without any grammar, in which every token may stand where it
            does; valid_tokens is the mean number of tokens before the first that may not.
        probe_accuracy: of contrastive embeddings, grouped folds; None without labels.
        seconds: that all of it took here.
    """

    name: str
    seed: int
    steps: int
    gflops: float
    nats_per_token: float
    nats_per_note: float
    nats_per_s: float
    valid_percent: float | None
    valid_tokens: float | None
    probe_accuracy: float | None
    probe_majority: float | None
    seconds: float


@dataclass(frozen=True)
class Study:
    """A comparison by training.

    Attributes:
        midi_dir: files with labels beside them.
        out: folder for everything that is made.
        steps: of the first scheme.
        seeds: how many networks of each scheme.
        label: that embeddings are probed for; None for none.
        digest: of the files and their labels.
    """

    midi_dir: Path
    out: Path
    steps: int
    seeds: int
    label: str | None
    digest: str
    compat: str | None = None

    def run(self, tokenizers: Sequence[Tokenizer]) -> tuple[list[Trained], list[str]]:
        """Every scheme and seed that is not done yet; results, and what was left out."""
        from aria_jax.cli.console import note, stage

        warnings: list[str] = []
        budget: float | None = None
        found: list[Trained] = []
        for tokenizer in tokenizers:
            self._build(tokenizer)
        for seed in range(self.seeds):
            for tokenizer in tokenizers:
                done_of_all = f"{len(found) + 1} of {len(tokenizers) * self.seeds}"
                stage(f"{done_of_all}: {tokenizer.preset_name}, seed {seed}")
                config, budget = self._pretraining(tokenizer, seed, budget)
                kept = self.out / tokenizer.preset_name / f"seed{seed}.json"
                done = self._kept(kept, config)
                if done is None:
                    done = self._train(tokenizer, config, seed, warnings)
                    record = {"identity": self._identity(config).to_json()}
                    write_atomically(kept, json.dumps({**record, "result": asdict(done)}))
                    note(_line(done))
                found.append(done)
        return found, list(dict.fromkeys(warnings))

    def _identity(self, config: "RunConfig") -> Identity:
        from aria_jax.config import to_dict

        settings: dict[str, Any] = {"pretrain": to_dict(config), "label": self.label}
        settings |= {"contrastive": [*CONTRASTIVE, CONTRASTIVE_SHARE], "clip": CLIP_S}
        return Identity("a trained scheme", 1, {"midi": self.digest}, settings)

    def _kept(self, path: Path, config: "RunConfig") -> Trained | None:
        if not path.is_file():
            return None
        before = json.loads(path.read_text())
        wanted = json.loads(json.dumps(self._identity(config).to_json()))
        if before["identity"] != wanted:
            raise UserError(
                f"{path} is of another comparison (other files, steps or settings); choose "
                "another --out, or remove it"
            )
        return Trained(**before["result"])

    def _corpus(self, tokenizer: Tokenizer) -> Path:
        return self.out / tokenizer.preset_name / "corpus"

    def _build(self, tokenizer: Tokenizer) -> None:
        from aria_jax.cli.console import progress_bar
        from data_pipeline.build import build

        with progress_bar(f"build {tokenizer.preset_name}", "file") as bar:
            build(
                self.midi_dir,
                self._corpus(tokenizer),
                tokenizer_preset=tokenizer.preset_name,
                filters="none",
                val_fraction=0.2,
                dedup="none",
                compat=self.compat,
                progress=bar,
            )

    # --- training ---

    def _pretraining(
        self, tokenizer: Tokenizer, seed: int, budget: float | None
    ) -> tuple["RunConfig", float]:
        """The run, with the steps that the budget allows; without one it is made here."""
        from aria_jax.config import with_overrides
        from aria_jax.presets import for_task
        from aria_jax.train.plan import tokens_per_step, train_flops_per_token
        from aria_jax.train.tasks import resolve

        config = with_overrides(for_task("tiny", "pretrain"), [*NETWORK, *PRETRAIN])
        config = resolve(config, self._corpus(tokenizer))
        per_step = train_flops_per_token(config) * tokens_per_step(config)
        budget = budget or self.steps * per_step
        steps = max(1, round(budget / per_step))
        return with_overrides(config, [f"seed={seed}", *_course(steps)]), budget

    def _train(
        self, tokenizer: Tokenizer, config: "RunConfig", seed: int, warnings: list[str]
    ) -> Trained:
        from aria_jax.checkpoints.models import load_model
        from aria_jax.cli import ProgressSink
        from aria_jax.cli.console import progress_bar, stage
        from aria_jax.config import with_overrides
        from aria_jax.generate.score import score_pieces
        from aria_jax.presets import for_task
        from aria_jax.train.loop import run
        from aria_jax.train.plan import tokens_per_step, train_flops_per_token

        began, corpus = time.perf_counter(), self._corpus(tokenizer)
        folder, names = corpus.parent, ("pretrain", "contrastive")
        workdirs = {name: folder / f"seed{seed}-{name}" for name in names}
        contrastive = with_overrides(
            for_task("tiny", "contrastive"),
            [*NETWORK, *CONTRASTIVE, f"seed={seed}",
             *_course(max(1, round(config.train.steps * CONTRASTIVE_SHARE)))],
        )  # fmt: skip
        begin: Path | None = None
        tasks = {"pretrain": config, **({"contrastive": contrastive} if self.label else {})}
        for task, settings in tasks.items():
            with progress_bar(f"{tokenizer.preset_name}, seed {seed}, {task}", "step") as bar:
                sinks = [ProgressSink(settings.train.steps, bar)]
                result = run(settings, corpus, workdirs[task], init_from=begin, sinks=sinks)
            if result.interrupted:
                raise KeyboardInterrupt
            begin = workdirs["pretrain"]
        stage(f"judging {tokenizer.preset_name}, seed {seed}")
        loaded = load_model(workdirs["pretrain"])
        ids, n_notes, music_s = self._held_out(tokenizer)
        scores = score_pieces(loaded.model, tokenizer, ids, context=config.data.seq_len)
        nats = float(sum(score.nll.sum(dtype=np.float64) for score in scores))
        valid, tokens = free_samples(loaded, tokenizer, ids, seed)
        accuracy, majority = self._probe(tokenizer, workdirs["contrastive"], warnings)
        flops = config.train.steps * train_flops_per_token(config) * tokens_per_step(config)
        return Trained(
            name=tokenizer.preset_name,
            seed=seed,
            steps=config.train.steps,
            gflops=flops / 1e9,
            nats_per_token=nats / sum(len(score.nll) for score in scores),
            nats_per_note=nats / n_notes,
            nats_per_s=nats / music_s,
            valid_percent=valid,
            valid_tokens=tokens,
            probe_accuracy=accuracy,
            probe_majority=majority,
            seconds=time.perf_counter() - began,
        )

    # --- what it has learnt ---

    def _held_out(self, tokenizer: Tokenizer) -> tuple[list[np.ndarray], int, float]:
        """Ids of the held-out clips, and their notes and seconds."""
        from data_pipeline.shards import TokenShards

        shards = TokenShards(self._corpus(tokenizer), "val")
        ids, n_notes, seconds = [], 0, 0.0
        for number in range(len(shards)):
            path = self.midi_dir / shards[number].meta["path"]
            one = clip(read_midi(path, compat=self.compat))
            ids.append(tokenizer.encode(one).astype(int))
            sounds = heard(one)
            n_notes += len(sounds)
            seconds += int(sounds["end"].max()) / 1000
        return ids, n_notes, seconds

    def _probe(
        self, tokenizer: Tokenizer, workdir: Path, warnings: list[str]
    ) -> tuple[float | None, float | None]:
        """Accuracy of a linear classifier on the embeddings of all labelled files, and of always
        naming the most frequent class."""
        if self.label is None:
            return None, None
        from aria_jax.embed.encode import performance_encoder
        from aria_jax.embed.export import embed_pieces
        from aria_jax.embed.pieces import Piece, open_source
        from aria_jax.eval.probe import probe

        encoder, corpus = performance_encoder(workdir), self._corpus(tokenizer)
        source = open_source(corpus, encoder.slicing, spool=corpus / "spool")
        pieces = [
            one
            for number in range(len(source.paths))
            if isinstance(one := source.piece(number), Piece) and one.labels.get(self.label)
        ]
        try:
            if not pieces:
                raise UserError(f"no file has the label {self.label}")
            table = embed_pieces(pieces, encoder.encode)
            groups = [one.labels.get("composition") or one.path for one in pieces]
            result = probe(table.embedding, table.column(self.label), groups=groups)
        except UserError as error:
            warnings.append(f"nothing was probed: {error}")
            return None, None
        return result.accuracy, result.majority_accuracy


def _course(steps: int) -> list[str]:
    every = [f"eval_every={steps}", "checkpoint_every=100", "keep_checkpoints=1"]
    return [f"steps={steps}", f"warmup_steps={max(1, steps // 10)}", *every]


def clip(performance: Performance, seconds: float = CLIP_S) -> Performance:
    """The notes that begin within the first seconds of music."""
    starts_ms = performance.ms(performance.notes["start"])
    n = int(np.searchsorted(starts_ms - starts_ms[0], seconds * 1000, side="right"))
    return performance.slice_notes(0, n)


def free_samples(
    loaded: "LoadedModel", tokenizer: Tokenizer, pieces: Sequence[np.ndarray], seed: int
) -> tuple[float | None, float | None]:
    """Percent of samples without a token out of place, and tokens before the first such; None for
    a scheme without a grammar, or where all pieces are too short to go on from."""
    from aria_jax.generate.continuation import continue_prompt
    from aria_jax.generate.decoding import Decoding
    from aria_jax.generate.sampler import Temperature
    from aria_jax.generate.weights import decoder_weights

    automaton, sampler = tokenizer.grammar(), Temperature(temperature=1.0)
    prompts = [ids[:PROMPT_TOKENS] for ids in pieces if len(ids) > PROMPT_TOKENS][:N_PROMPTS]
    if automaton is None or not prompts:
        return None, None
    settings = Decoding(sampler=sampler, max_tokens=SAMPLE_TOKENS, use_grammar=False)
    weights, lengths, valid = decoder_weights(loaded.model), [], []
    for number, prompt in enumerate(prompts):
        options: dict[str, Any] = {"n": N_SAMPLES, "seed": 1000 * seed + number}
        for one in continue_prompt(weights, tokenizer, prompt, settings=settings, **options):
            error = automaton.first_error(np.concatenate([prompt, one.ids]))
            valid.append(error < 0)
            lengths.append(len(one.ids) if error < 0 else error - PROMPT_TOKENS)
    return 100 * float(np.mean(valid)), float(np.mean(lengths))


# --- for people ---

_MEASURES = {
    "steps": ("steps", ",.0f"),
    "nats_per_token": ("nats/token", ".3f"),
    "nats_per_note": ("nats/note", ".3f"),
    "nats_per_s": ("nats/s", ".2f"),
    "valid_percent": ("valid samples %", ".0f"),
    "valid_tokens": (f"valid tokens of {SAMPLE_TOKENS}", ".0f"),
    "probe_accuracy": ("probe accuracy", ".3f"),
}


def _line(one: Trained) -> str:
    (_, *titles), [(_, *cells)] = summary_rows([one])
    parts = [f"{title} {cell}" for title, cell in zip(titles, cells, strict=True)]
    return f"{one.name}, seed {one.seed}: {', '.join(parts)} ({one.seconds:.0f} s)"


def summary_rows(trained: Sequence[Trained]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: mean over the seeds, and ± their standard deviation."""
    rows = []
    for name in dict.fromkeys(one.name for one in trained):
        mine = [one for one in trained if one.name == name]
        cells = [name]
        for measure, (_, shape) in _MEASURES.items():
            values = [getattr(one, measure) for one in mine]
            if any(value is None for value in values):
                cells.append("–")
                continue
            spread = f" ± {np.std(values, ddof=1):{shape}}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):{shape}}" + (spread if measure != "steps" else ""))
        rows.append(cells)
    return ["scheme", *(title for title, _ in _MEASURES.values())], rows


_COLOURS = {
    Kind.TIME: "#ddd", Kind.NOTE: "#bcd3ee", Kind.DRUM: "#bcd3ee", Kind.ONSET: "#cfe6c8",
    Kind.VELOCITY: "#e9c7dd", **dict.fromkeys((Kind.DUR, Kind.HELD, Kind.NOTE_OFF), "#f3d3b8"),
}  # fmt: skip


def tokens_as_html(tokenizer: Tokenizer, performance: Performance) -> str:
    """Every token as a box in the colour of what it says, and how many there are."""
    ids, boxes = tokenizer.encode(performance), []
    for one in ids.tolist():
        token = tokenizer.tokens[one]
        text = token if isinstance(token, str) else " ".join(map(str, token))
        colour = _COLOURS.get(Kind(int(tokenizer.kind[one])), "#f6f6f2")
        boxes.append(f'<span style="background:{colour}">{html.escape(text)}</span>')
    return f'<p class="tokens">{" ".join(boxes)} ({len(ids)} tokens)</p>'


def write_report(
    path: Path,
    reports: Sequence[SchemeReport],
    table: tuple[list[str], list[list[str]]],
    trained: Sequence[Trained],
    example: Performance,
    command: str,
) -> None:
    """The page: a bar in every scheme, what a round trip loses, and what was learnt."""
    from aria_jax import report
    from aria_jax.report.piano_roll import Part, piano_roll_svg

    bar = clip(example, BAR_S)
    style = (
        "<style>.tokens span { display: inline-block; margin: 1px; padding: 0 .35em; "
        "border-radius: 3px; color: #222; font: 12px/1.6 ui-monospace, monospace }</style>"
    )
    figure = [style, report.paragraph(f"The first {BAR_S:g} s of the first file.")]
    figure.append(piano_roll_svg([Part.of(bar, "")], (9, 2.4)))
    for one in reports:
        tokenizer = Tokenizer.preset(one.name)
        try:
            figure.append(f"<h3>{html.escape(one.name)}</h3>{tokens_as_html(tokenizer, bar)}")
        except InvalidMidi as error:
            figure.append(report.paragraph(f"{one.name}: {error}"))
    sections = [
        report.Section("One bar in every scheme", "\n".join(figure)),
        report.Section("What a round trip keeps", report.table(*table)),
    ]
    if trained:
        text = (
            f"The same network for each, {trained[0].gflops:,.0f} GFLOP of pretraining; held-out "
            "pieces of the same split. A coarser grid of times says less and is easier to "
            "predict: read the nats beside the errors of the round trip."
        )
        body = report.paragraph(text) + report.table(*summary_rows(trained))
        sections.append(report.Section("What the same network learns", body))
    report.write_page(path, "Schemes of tokens", "", sections, report.Provenance(command))
