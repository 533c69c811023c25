"""`aria-jax generate`: continue a performance."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aria_jax.checkpoints import RELEASED_LM, RELEASED_NAMES
from aria_jax.cli import Verb, Writes, add_compat, add_overwrite, chosen_reading

if TYPE_CHECKING:
    import numpy as np

    from aria_jax.checkpoints.models import LoadedModel
    from aria_jax.generate.continuation import Continuation
    from aria_jax.generate.decoding import Decoding
    from aria_jax.generate.given import GivenTracks
    from data_pipeline.tokenizers import Tokenizer

DESCRIPTION = """\
Continue a performance. Per continuation there is a MIDI file with the prompt, one without, and a
piano roll; one HTML page plays them all. Without a prompt the piece begins from nothing.

A model sees so many tokens at once as it was trained with (its max_seq_len); the prompt takes 3 a
note, and where both do not fit, less is generated than --max-tokens: that is said before. With
--sliding it goes on instead: where the context is full, the oldest half of it is forgotten, in
whole stretches of 5 s, and the rest is read again.

With --given some tracks of the prompt's file go on as they are, to their end, and the model plays
the rest: their notes are put among its own in their time. --seconds 0 begins with their first note.

What is generated can always be decoded: a grammar of notes forbids everything else
(--no-grammar switches it off). The same --seed gives the same music, whatever --n is.

examples:
  aria-jax generate --prompt nocturne.mid --out out                    with the released mini
  aria-jax generate --checkpoint run1 --prompt nocturne.mid --out out
  aria-jax generate --checkpoint run1 --prompt nocturne.mid --seconds 20 --n 8 --end --out out
  aria-jax generate --checkpoint run1 --prompt nocturne.mid --max-tokens 6000 --sliding --out out
  aria-jax generate --checkpoint run1 --out out                        from nothing
  aria-jax generate --checkpoint run1 --prompt song.mid --given melody --play piano bass --out out
  aria-jax generate --checkpoint run1 --prompt-ids ids.json --temperature 0 --json"""


MIN_P, MAX_N = 0.035, 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax generate`."""
    add = parser.add_argument
    parser.stray = "--prompt"  # type: ignore[attr-defined]
    what = f"workdir of a language model, .safetensors or hf://OWNER/NAME ({RELEASED_LM})"
    add("--checkpoint", default=RELEASED_LM, metavar="C", help=what)
    add("--out", metavar="DIR", help="folder for the files; only --json can do without")
    prompt = parser.add_argument_group("prompt (default: none)").add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="X.mid", help="continue its first 15 seconds")
    prompt.add_argument(
        "--prompt-ids", metavar="IDS.json", help='token ids, as a list or {"ids": [...]}'
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="length of the prompt (15)")
    length.add_argument("--notes", type=int, help="length of the prompt, in notes")
    tracks = parser.add_argument_group("accompaniment")
    text = "tracks of the prompt, by name or instrument, that come as they are to their end"
    tracks.add_argument("--given", nargs="+", metavar="TRACK", help=text)
    text = "instruments that the model plays (those of the other tracks)"
    tracks.add_argument("--play", nargs="+", metavar="INSTRUMENT", help=text)
    add("--n", type=int, default=1, help="continuations (1)")
    add(
        "--max-tokens",
        type=int,
        default=1024,
        help="tokens of each, 3 a note (1024); at most what the context holds behind the prompt",
    )
    add("--sliding", action="store_true", help="forget the oldest events where the context is full")
    add("--seed", type=int, default=0, help="of the random choices (0)")
    how = parser.add_argument_group("sampling")
    how.add_argument("--temperature", type=float, default=0.98, help="0 is greedy (0.98)")
    how.add_argument("--min-p", type=float, help="least share of the likeliest token (0.035)")
    how.add_argument("--top-p", type=float, help="instead: likeliest tokens up to this mass")
    how.add_argument("--top-k", type=int, help="instead: this many likeliest tokens")
    how.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="over recent notes; 1 is none (1)"
    )
    how.add_argument("--repetition-window", type=int, help="how many tokens are recent (96)")
    how.add_argument("--no-grammar", action="store_true", help="sample without the grammar")
    how.add_argument("--end", action="store_true", help="ask for an ending within --max-tokens")
    add_compat(parser, "default: as the model's corpus was read")
    like = parser.add_argument_group("in the manner of another piece")
    like.add_argument("--embedding", metavar="E.mid", help="piece to condition on")
    like.add_argument("--embedding-checkpoint", metavar="C", help="contrastive run to embed it")
    like.add_argument("--cfg", type=float, help="strength of the condition (1)")
    add(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16", "int8"),
        help="of the weights; int8 is the fastest, float32 the most exact (float32)",
    )
    add("--mesh", metavar="AXIS=N,…", help="spread over devices, e.g. tensor=4")
    add("--wav", metavar="FONT.sf2", help="also render sound with this SoundFont")
    add_overwrite(parser)
    add("--json", action="store_true", help='print {"ids": [[…]], …} of the continuations')


def _prompt_name(args: argparse.Namespace) -> str:
    return Path(args.prompt).stem if args.prompt else "prompt" if args.prompt_ids else "piece"


def _outputs(args: argparse.Namespace) -> list[Path]:
    """The page, and the files of each continuation."""
    from data_pipeline.errors import UserError

    if not 1 <= args.n <= MAX_N:
        raise UserError(f"--n {args.n}: at least 1, at most {MAX_N:,}; go on with another --seed")
    if not args.out:
        return []
    kinds = [".mid", "-continuation.mid", ".png", *([".wav"] if args.wav else [])]
    name = _prompt_name(args)
    names = [f"{name}-{i}{kind}" for i in range(1, args.n + 1) for kind in kinds]
    return [Path(args.out) / file for file in (f"{name}.html", *names)]


def run(args: argparse.Namespace) -> None:
    """Generates and saves."""
    from aria_jax.cli.console import note, print_result, stage

    stage("loading jax")
    limits = _checked_limits(args)
    settings = _settings(args)

    from aria_jax.checkpoints import model_path
    from aria_jax.checkpoints.models import load_model
    from aria_jax.generate.continuation import check_memory, fitting_tokens, less_room
    from aria_jax.generate.weights import decoder_weights
    from aria_jax.sharding import mesh_of
    from data_pipeline.tokenizers import Tokenizer, of_music

    stage("loading the model")
    mesh = None if args.mesh is None else mesh_of(args.mesh)
    if args.checkpoint in RELEASED_NAMES and model_path(args.checkpoint) != Path(args.checkpoint):
        note(f"model: the released {args.checkpoint} (--checkpoint takes one of yours)")
    loaded = load_model(args.checkpoint, mesh=mesh)
    tokenizer = of_music(Tokenizer.preset(loaded.tokenizer), "generate")
    prompt, given = _prompt(args, tokenizer, loaded.reading, limits)
    weights = decoder_weights(loaded.model, args.precision)
    room = fitting_tokens(weights, prompt, settings)
    warnings = []
    if room < args.max_tokens:
        text = less_room(len(prompt), room, args.max_tokens, weights.max_seq_len)
        warnings.append(f"{text} (--seconds, --notes; --sliding)")
    if args.n > 1 and args.temperature == 0:
        warnings.append("with --temperature 0 all --n are the same")
    for warning in warnings:  # before the work, not after it
        note(f"aria-jax: warning: {warning}")
    condition = _condition(args, loaded.config.emb_size)
    check_memory(weights, args.n, room, guided=condition is not None)
    how = {"settings": settings, "given": given, "condition_E": condition, "mesh": mesh}
    continuations = _generate(args, weights, tokenizer, prompt, **how)
    files = _save(args, loaded, prompt, continuations) if args.out else []
    result = {
        "ids": [c.ids.tolist() for c in continuations],
        "prompt_ids": prompt.tolist(),
        "max_tokens": room,
        "n_notes": [c.n_notes for c in continuations],
        "seconds": [c.seconds for c in continuations],
        "ended": [bool(c.ended) for c in continuations],
        "files": files,
        "warnings": warnings,
    }
    if given is not None:
        marks = [given.is_given(tokenizer, c.ids)[len(prompt) :].tolist() for c in continuations]
        result |= {"given": given.names, "is_given": marks}
    lines = [
        f"{paths['midi']}: {_remark(c)}" for paths, c in zip(files, continuations, strict=False)
    ]
    if files:
        lines.append(f"listen: {files[0]['page']}")
    print_result(result, args.json, "\n".join(lines))


GENERATE = Verb(
    DESCRIPTION,
    add_arguments,
    run,
    Writes(
        _outputs,
        ("checkpoint", "prompt", "prompt_ids", "embedding", "embedding_checkpoint", "wav"),
        in_folder=True,
    ),
)


def _checked_limits(args: argparse.Namespace) -> dict[str, Any]:
    """How much of a prompt is taken; refuses what could not be done, or would have no effect."""
    from aria_jax.cli.convert import check_midi, read_ids
    from data_pipeline.errors import UserError

    if args.out is None and not args.json:
        raise UserError("say where to save with --out DIR (or --json to print the ids only)")
    if args.embedding and not args.embedding_checkpoint:
        raise UserError("--embedding needs --embedding-checkpoint: the run that embeds the piece")
    needs = {
        "--seconds": (args.seconds, args.prompt, "--prompt X.mid, of which it is the length"),
        "--notes": (args.notes, args.prompt, "--prompt X.mid, of which it is the length"),
        "--given": (args.given, args.prompt, "--prompt X.mid, whose tracks they are"),
        "--play": (args.play, args.given, "--given TRACK, which it is played with"),
        "--cfg": (args.cfg, args.embedding, "--embedding E.mid, the condition that it is of"),
        "--embedding-checkpoint": (args.embedding_checkpoint, args.embedding, "--embedding E.mid"),
        "--repetition-window": (args.repetition_window, args.repetition_penalty != 1,
                                "--repetition-penalty above 1"),
        "--compat": (args.compat, args.prompt or args.embedding,
                     "--prompt X.mid or --embedding E.mid, the files that are read"),
        "--wav": (args.wav, args.out, "--out DIR, where the sound goes"),
        **{
            f"--{name}": (getattr(args, name.replace("-", "_")), args.temperature, "a --temperature"
                          " above 0: at 0 the likeliest token is taken")
            for name in ("min-p", "top-p", "top-k")
        },
    }  # fmt: skip
    for option, (given, needed, text) in needs.items():
        if given is not None and not needed:
            raise UserError(f"{option} has no effect without {text}")
    for path, check in (
        (args.prompt, check_midi), (args.prompt_ids, read_ids), (args.embedding, check_midi),
    ):  # fmt: skip
        if path is not None:
            check(path)
    if args.wav is not None:
        from aria_jax.report.listening import check_sound

        check_sound(args.wav)
    if args.out is not None and Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file; name a folder for the continuations")
    if args.given and (args.end or args.no_grammar):
        raise UserError("--end and --no-grammar cannot go with --given: the given tracks say when")
    if args.prompt is None:
        return {}
    from aria_jax.generate.continuation import check_prompt_limits

    unlimited = args.seconds is None and args.notes is None
    limits = {"seconds": 15.0 if unlimited else args.seconds, "notes": args.notes}
    check_prompt_limits(**limits, from_nothing=bool(args.given))
    return limits


def _settings(args: argparse.Namespace) -> "Decoding":
    from aria_jax.generate.decoding import Decoding
    from aria_jax.generate.sampler import RepetitionPenalty, choose_sampler

    uncut = args.min_p is None and args.top_p is None and args.top_k is None
    return Decoding(
        sampler=choose_sampler(
            args.temperature,
            min_p=MIN_P if uncut and args.temperature else args.min_p,
            top_p=args.top_p,
            top_k=args.top_k,
        ),
        max_tokens=args.max_tokens,
        use_grammar=not args.no_grammar,
        force_end=args.end,
        guidance=1.0 if args.cfg is None else args.cfg,
        repetition=RepetitionPenalty(
            penalty=args.repetition_penalty,
            window=96 if args.repetition_window is None else args.repetition_window,
        ),
        sliding=args.sliding,
    )


def _prompt(
    args: argparse.Namespace,
    tokenizer: "Tokenizer",
    model_reading: str,
    limits: dict[str, Any],
) -> "tuple[np.ndarray, GivenTracks | None]":
    from aria_jax.cli.console import note
    from aria_jax.cli.convert import read_ids
    from aria_jax.generate.continuation import prompt_of_file, unconditional_prompt
    from data_pipeline.midi import compat_of

    if args.prompt:
        compat = compat_of(chosen_reading(args.compat, model_reading, args.checkpoint))
        if args.given:
            from aria_jax.generate.given import given_tracks

            options = {"play": args.play or (), "compat": compat, **limits}
            given = given_tracks(args.prompt, tokenizer, args.given, **options)
            return given.prompt, given
        prompt = prompt_of_file(args.prompt, tokenizer, compat=compat, **limits)
        if args.seconds or args.notes:
            all_of_it = prompt_of_file(args.prompt, tokenizer, compat=compat, notes=sys.maxsize)
            n_notes = tokenizer.n_notes(all_of_it)
            if len(prompt) == len(all_of_it) and (args.notes or n_notes + 1) > n_notes:
                note(
                    f"aria-jax: warning: {args.prompt} ends before: all {n_notes} notes of it are "
                    "the prompt"
                )
        return prompt, None
    return read_ids(args.prompt_ids) if args.prompt_ids else unconditional_prompt(tokenizer), None


def _condition(args: argparse.Namespace, emb_size: int | None) -> "np.ndarray | None":
    """The embedding of --embedding: the mean over its slices, as `aria-jax embed` computes it."""
    from data_pipeline.errors import UserError

    if not args.embedding:
        return None
    if not emb_size:
        raise UserError(
            f"{args.checkpoint}: this model takes no embedding (it was trained without an adapter, "
            "model.emb_size); leave --embedding out"
        )
    from aria_jax.embed.encode import performance_encoder
    from data_pipeline.midi import compat_of, read_midi

    encoder = performance_encoder(args.embedding_checkpoint)
    reading = chosen_reading(args.compat, encoder.slicing.reading, args.embedding_checkpoint)
    condition = encoder(read_midi(args.embedding, compat=compat_of(reading)))
    if len(condition) != emb_size:
        raise UserError(
            f"{args.embedding_checkpoint} embeds in {len(condition)} numbers, "
            f"{args.checkpoint} is conditioned on {emb_size}: use the pair trained together"
        )
    return condition


def _generate(args: argparse.Namespace, *inputs: Any, **how: Any) -> "list[Continuation]":
    from aria_jax.cli.console import progress_bar, stage
    from aria_jax.generate.continuation import continue_prompt

    stage("reading the prompt and compiling")
    with progress_bar("generate", "token") as bar:
        return continue_prompt(
            *inputs,
            **how,
            n=args.n,
            seed=args.seed,
            progress=lambda now: bar(now.n_tokens, now.max_tokens, str(now)),
        )


def _remark(continuation: "Continuation") -> str:
    ending = ", ended by the model" if continuation.ended else ""
    if continuation.given is not None:
        ending = f", with {' and '.join(continuation.given.names)} as given"
    return f"{continuation.n_notes} notes, {continuation.seconds:.1f} s{ending}"


def _save(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    prompt: "np.ndarray",
    continuations: "list[Continuation]",
) -> list[dict[str, str]]:
    from aria_jax.cli.console import stage
    from aria_jax.models import parameter_count
    from aria_jax.models.heads import parameter_specs
    from aria_jax.report import Provenance
    from aria_jax.report.listening import Result, save_continuations
    from data_pipeline.tokenizers import Tokenizer

    stage("writing the files")
    name = _prompt_name(args)
    results = [
        Result(c.full, c.prompt, c.continuation, c.continuation_from_zero, _remark(c), c.by_origin)
        for c in continuations
    ]
    n_params = parameter_count(parameter_specs(loaded.config))
    n_notes = Tokenizer.preset(loaded.tokenizer).n_notes(prompt)
    source = args.prompt or args.prompt_ids
    facts = {
        "prompt": f"{n_notes} notes of {source}" if source else "none: from nothing",
        "model": f"{n_params:,} parameters, {loaded.path}",
        "checkpoint step": f"{loaded.step:,}",
        "seed": str(args.seed),
        "sampling": _sampling(args),
        "precision": args.precision,
    }
    if args.embedding:
        facts["in the manner of"] = f"{args.embedding}, strength {args.cfg or 1.0:g}"
    made_by = Provenance(args.command_line, facts)
    return save_continuations(args.out, name, results, made_by=made_by, soundfont=args.wav)


def _sampling(args: argparse.Namespace) -> str:
    """For people, e.g. "temperature 0.98, min-p 0.035, at most 1,024 tokens"."""
    truncations = {"min-p": args.min_p, "top-p": args.top_p, "top-k": args.top_k}
    given = [f"{name} {value:g}" for name, value in truncations.items() if value is not None]
    parts = [f"temperature {args.temperature:g}", *(given or [f"min-p {MIN_P:g}"])]
    if args.temperature == 0:
        parts = ["the likeliest token"]
    if args.repetition_penalty != 1:
        parts.append(f"repetition penalty {args.repetition_penalty:g}")
    parts += ["without the grammar"] * args.no_grammar + ["an ending asked for"] * args.end
    parts += ["sliding context"] * args.sliding
    return ", ".join([*parts, f"at most {args.max_tokens:,} tokens"])
