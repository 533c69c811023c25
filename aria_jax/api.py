"""The short way: functions with good defaults over what the rooms do, for `import aria_jax`."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from aria_jax.config import RunConfig, Task, with_settings
from data_pipeline import storage
from data_pipeline.artifact import new_folder
from data_pipeline.errors import InvalidMidi, UserError, expect, kind_of
from data_pipeline.midi import Performance, compat_of, read_midi
from data_pipeline.tokenizers import Tokenizer

if TYPE_CHECKING:
    from aria_jax.checkpoints.models import LoadedModel
    from aria_jax.embed.table import Embeddings
    from aria_jax.generate.continuation import Continuation
    from aria_jax.generate.score import Score
    from aria_jax.train.loop import TrainResult
    from data_pipeline.loaders.mixture import Data

File = str | Path | Performance
"""A MIDI file, or what was read from one."""


def load(path: str | Path, **options: Any) -> "LoadedModel":
    """The model of a workdir or checkpoint; `options` as `checkpoints.models.load_model` takes.

    Raises:
        UserError: no model there.
    """
    from aria_jax.checkpoints.models import load_model

    if not isinstance(path, str | Path):
        raise UserError(f"load: expected the path of a checkpoint, not {kind_of(path)}")
    return load_model(path, **options)


def tokenise(file: File, preset: str = "aria") -> np.ndarray:
    """Token ids of a MIDI file or performance, uint16 [L]."""
    performance = _performance(file, "tokenise")
    return Tokenizer.preset(preset).encode(performance)


def detokenise(ids: Sequence[int] | np.ndarray, preset: str = "aria") -> Performance:
    """The performance that token ids stand for, at 1 tick = 1 ms.

    Raises:
        UserError: something else than whole numbers in one dimension.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        raise UserError(f"detokenise: expected token ids, integers [L], not {_described(array)}")
    return Tokenizer.preset(preset).decode(array.astype(np.int64))


def embed(
    model: "LoadedModel | str | Path",
    source: "File | Sequence[str | Path]",
    *,
    metadata: str | Path | None = None,
    slice_notes: int | None = None,
    max_tokens: int | None = None,
    pool_slices: str = "mean",
) -> "np.ndarray | Embeddings":
    """Embeddings as `aria-jax embed` computes them: the mean over consecutive slices of 300 notes.

    Args:
        model: trained by `train contrastive`, or its path.
        source: a performance or MIDI file; or a folder, archive, token shards or list of files.
        metadata: labels of a folder's files (default: metadata.json beside them).
        slice_notes: notes of a slice (default: 300, or fewer where the model was trained on fewer).
        max_tokens: tokens of a slice (default: 2,048, or as many as it was trained on).
        pool_slices: "mean", or "mean+std" for the standard deviation over slices too: [2E].

    Returns:
        float32 [E] for a performance or one file; else a table with a row per file: `path`,
        `embedding` float32 [N, E], `labels`, … Files that cannot be read are left out with a
        warning.

    Raises:
        UserError: no embedding head, no such file, nothing to embed, no such `pool_slices`.
    """
    from aria_jax.embed.encode import performance_encoder
    from aria_jax.embed.export import embed_pieces
    from aria_jax.embed.pieces import Piece, open_source

    encoder = performance_encoder(
        _model(model, "embed"), slice_notes=slice_notes, max_tokens=max_tokens, pool=pool_slices
    )
    if isinstance(source, Performance):
        return encoder(source)
    if isinstance(source, str | Path) and Path(source).suffix.lower() in (".mid", ".midi", ".kar"):
        return encoder(read_midi(source, compat=compat_of(encoder.slicing.reading)))
    if not isinstance(source, str | Path | list | tuple):
        raise UserError(
            "embed: expected a Performance, the path of a file or folder, or a list of paths, "
            f"not {kind_of(source)}"
        )
    with TemporaryDirectory() as folder:
        opened = open_source(
            source, encoder.slicing, spool=Path(folder) / "spool", metadata=metadata
        )
        found = [opened.piece(i) for i in range(len(opened.paths))]
    pieces = [piece for piece in found if isinstance(piece, Piece)]
    _warn_left_out([f"{r.path}: {r.message}" for r in found if not isinstance(r, Piece)])
    if not pieces:
        raise UserError(f"{source}: none of the {len(found)} files could be embedded")
    return embed_pieces(pieces, encoder.encode, pool=encoder.pool, fingerprint=encoder.fingerprint)


def generate(
    model: "LoadedModel | str | Path",
    prompt: File | None = None,
    *,
    seconds: float = 15.0,
    n: int = 1,
    max_tokens: int = 1024,
    seed: int = 0,
    temperature: float = 0.98,
    min_p: float = 0.035,
    ending: bool = False,
    sliding: bool = False,
    given: Sequence[str] = (),
    play: Sequence[str] = (),
) -> "list[Continuation]":
    """Continuations of a performance, as `aria-jax generate` makes them.

    Args:
        model: a language model, or its path.
        prompt: of which the first `seconds` are continued; None begins from nothing.
        n: continuations; max_tokens: of each, three a note; fewer where the context is full, with
            a warning.
        seed: the same one gives the same music.
        temperature: 0 is greedy; min_p: least share of the likeliest token.
        ending: asks for an ending within `max_tokens`.
        sliding: forgets the oldest events where the context is full, and goes on.
        given: tracks of `prompt`, or instruments, whose notes come as they are, to their end;
            `seconds=0` begins with the first of them. play: instruments that the model plays beside
            them; those of the other tracks by default.

    Returns:
        `n` continuations: `.full`, `.continuation` and `.prompt` are performances for `write_midi`.

    Raises:
        UserError: no language model, no such file, an empty or too long prompt, no such track.
    """
    from aria_jax.generate.continuation import (
        check_prompt_limits,
        continue_prompt,
        fitting_tokens,
        less_room,
        make_prompt,
        unconditional_prompt,
    )
    from aria_jax.generate.decoding import Decoding
    from aria_jax.generate.given import given_tracks
    from aria_jax.generate.sampler import choose_sampler
    from aria_jax.generate.weights import decoder_weights

    loaded = _model(model, "generate")
    tokenizer = Tokenizer.preset(loaded.tokenizer)
    tracks = None
    if given:
        if prompt is None or ending:
            raise UserError("generate: given tracks are of a prompt, and the piece ends with them")
        check_prompt_limits(seconds=seconds, notes=None, from_nothing=True)
        compat = None if isinstance(prompt, Performance) else compat_of(loaded.reading)
        options: dict[str, Any] = {"play": play, "seconds": seconds, "compat": compat}
        tracks = given_tracks(prompt, tokenizer, given, **options)
        ids = tracks.prompt
    elif play:
        raise UserError("generate: play says what goes with given tracks, of which there are none")
    elif prompt is None:
        ids = unconditional_prompt(tokenizer)
    else:
        performance = _performance(prompt, "generate", loaded.reading)
        ids = make_prompt(performance, tokenizer, seconds=seconds)
    settings = Decoding(
        sampler=choose_sampler(temperature, min_p=min_p, top_p=None, top_k=None),
        max_tokens=max_tokens,
        force_end=ending,
        sliding=sliding,
    )
    weights = decoder_weights(loaded.model)
    if (room := fitting_tokens(weights, ids, settings)) < max_tokens:
        text = less_room(len(ids), room, max_tokens, weights.max_seq_len)
        warnings.warn(f"generate: {text}", stacklevel=2)
    return continue_prompt(weights, tokenizer, ids, n=n, seed=seed, settings=settings, given=tracks)


def score(
    model: "LoadedModel | str | Path", files: File | Sequence[File], *, context: int | None = None
) -> "Score | list[Score]":
    """Negative log-likelihood of performances in nats: `.mean_nll` per token, `.notes`.

    Args:
        model: a language model, or its path.
        files: one gives one score, a list a list.
        context: tokens of a window; the model's own by default.

    Raises:
        UserError: no language model, no such file, a performance without notes.
    """
    from aria_jax.generate.score import score_pieces

    loaded = _model(model, "score")
    tokenizer = Tokenizer.preset(loaded.tokenizer)
    several = isinstance(files, list | tuple)
    given: Sequence[Any] = files if several else [files]  # type: ignore[assignment]
    performances = [_performance(file, "score", loaded.reading) for file in given]
    for file, performance in zip(given, performances, strict=True):
        if not len(performance.notes):
            name = file if isinstance(file, str | Path) else "this performance"
            raise InvalidMidi("no-notes", f"score: {name} has no notes")
    ids = [tokenizer.encode(performance).astype(int) for performance in performances]
    scores = score_pieces(loaded.model, tokenizer, ids, context=context)
    return scores if several else scores[0]


def train(
    task: Task | RunConfig,
    data: "Data",
    workdir: str | Path,
    *,
    preset: str = "tiny",
    init_from: str | Path | None = None,
    **settings: Any,
) -> "TrainResult":
    """Trains, or goes on training, as `aria-jax train` does: `train("pretrain", D, W, steps=200)`.

    Args:
        task: "pretrain", "continue", "contrastive", "classify" or "render" of a preset, or a whole
            run.
        data: folder of token shards, or a list of several with weights, ["A:0.7", "B:0.3"];
            workdir: of the run, made if needed.
        init_from: checkpoint whose weights a new run starts from.
        settings: by their names on the command line (docs/api.md, `aria-jax train --settings`).

    Raises:
        UserError: everything wrong with the settings at once; unusable data or checkpoint.
    """
    from typing import get_args

    import jax

    from aria_jax.presets import for_task
    from aria_jax.train.loop import run, send_workdir
    from aria_jax.train.trackers import open_sinks

    if not isinstance(task, RunConfig) and task not in get_args(Task):
        raise UserError(
            f"train: expected a task of {', '.join(get_args(Task))}, or a RunConfig, not {task!r}"
        )
    config = task if isinstance(task, RunConfig) else for_task(preset, task)
    config = with_settings(config, settings.items()).validate()
    folder = storage.local(workdir)
    sinks = open_sinks(config, folder) if jax.process_index() == 0 else []
    try:
        with new_folder(folder, make=False):
            return run(config, data, folder, init_from=init_from, sinks=sinks)
    finally:
        for sink in sinks:
            sink.close()
        if folder.exists():
            send_workdir(folder)


def _model(model: "LoadedModel | str | Path", verb: str) -> "LoadedModel":
    from aria_jax.checkpoints.models import LoadedModel

    if isinstance(model, str | Path):
        return load(model)
    wanted = f"{verb}: a model of `aria_jax.load`, or the path of one, as the first argument"
    return expect(model, LoadedModel, wanted)


def _performance(file: File, verb: str, reading: str | None = None) -> Performance:
    if isinstance(file, str | Path):
        return read_midi(file, compat=None if reading is None else compat_of(reading))
    return expect(file, Performance, f"{verb}: a Performance, or the path of a MIDI file")


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _warn_left_out(reasons: Sequence[str]) -> None:
    for reason in reasons:
        warnings.warn(f"left out: {reason}", stacklevel=3)
