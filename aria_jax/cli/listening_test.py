"""`aria-jax listening-test`: blinded A/B pages, the analysis of votes, and objective companions."""

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aria_jax.cli import Verb, Writes, add_overwrite
from data_pipeline.artifact import write_atomically

if TYPE_CHECKING:
    from aria_jax.eval.comparison import Comparison, Trial
    from aria_jax.report.listening import Clip
    from data_pipeline.midi import Performance

DESCRIPTION = """\
The paper's listening test: 15 s prompts, 45 s continuations, ours against another system's in
blinded pairs, sides and prompts counter-balanced.

  make     CLIPS/SYSTEM/PROMPT.mid (or .wav, .mp3, …) -> one page a judge, and key.json, which alone
           says what was what: keep it from the judges. Both clips of a pair must begin with the
           same prompt: of the notes in the first 90 % of --prompt-seconds, 95 % with the same pitch
           and an onset at most 50 ms away, counted from the first note; else the pair is named and
           nothing is written. Sound files cannot be compared so, which is said
  analyse  key.json and the judges' votes-*.json -> wins, ties, losses, exact sign test
  counts   the same test of counts you already have; with --participants, whether they fit
  compare  two folders of MIDI -> density, entropy, intervals, self-similarity of either, and with
           --checkpoint the Fréchet distance of their embeddings

examples:
  aria-jax listening-test make clips study --ours aria --judges 46 --trials 4
  aria-jax listening-test analyse study/key.json votes-*.json
  aria-jax listening-test counts 38 0 6 --judgements 44
  aria-jax listening-test counts 38 0 6 --participants 46
  aria-jax listening-test compare generated held_out --checkpoint run2"""

KEY_FORMAT = "aria-jax-listening-test-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax listening-test`."""
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="write the pages")
    make.add_argument("clips", help="folder with one folder of clips a system")
    make.add_argument("out", help="folder for the pages")
    make.add_argument("--ours", required=True, help="the system the others are compared with")
    make.add_argument("--judges", type=int, required=True, help="how many pages")
    make.add_argument("--trials", type=int, help="pairs a judge (default: one per opponent)")
    make.add_argument("--seconds", type=float, default=60.0, help="of each clip (60)")
    make.add_argument(
        "--prompt-seconds", type=float, default=15.0, help="of each clip that are the prompt (15)"
    )
    make.add_argument("--seed", type=int, default=0, help="of the plan (0)")
    add_overwrite(make)
    analyse = actions.add_parser("analyse", help="analyse votes")
    analyse.add_argument("key", help="key.json of the study")
    analyse.add_argument("votes", nargs="+", help="votes-*.json of the judges")
    counts = actions.add_parser("counts", help="analyse counts")
    for name in ("wins", "ties", "losses"):
        counts.add_argument(name, type=int)
    counts.add_argument("--judgements", type=int, help="how many there should be")
    counts.add_argument(
        "--participants", type=int, help="how many people judged, once each: does the sum fit?"
    )
    compare = actions.add_parser("compare", help="objective statistics of two folders")
    compare.add_argument("generated", help="folder of MIDI files")
    compare.add_argument("reference", help="folder of MIDI files")
    compare.add_argument("--checkpoint", metavar="C", help="contrastive run to embed them with")
    for action in (make, analyse, counts, compare):
        action.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    """Does what `args.action` says."""
    {"make": _make, "analyse": _analyse, "counts": _counts, "compare": _compare}[args.action](args)


LISTENING_TEST = Verb(
    DESCRIPTION,
    add_arguments,
    run,
    Writes(
        lambda args: [Path(args.out) / "key.json"] if args.action == "make" else [],
        ("clips",),
        in_folder=True,
        source="clips",
    ),
)


# --- make ----------------------------------------------------------------------------------------


def _make(args: argparse.Namespace) -> None:
    import numpy as np

    from aria_jax.cli.console import print_result, stage
    from aria_jax.eval.comparison import design
    from aria_jax.report.listening import Question, write_judge_page
    from data_pipeline.errors import UserError

    if not 0 < args.prompt_seconds < args.seconds:
        raise UserError(
            f"--prompt-seconds {args.prompt_seconds:g} must lie between 0 and the "
            f"{args.seconds:g} --seconds of a clip"
        )
    for option, given in (("--judges", args.judges), ("--trials", args.trials)):
        if given is not None and given < 1:
            raise UserError(f"{option} {given} must be at least 1")
    clips = _find_clips(Path(args.clips))
    if args.ours not in clips:
        raise UserError(f"{args.clips}: no folder {args.ours!r}; there are {', '.join(clips)}")
    opponents = [name for name in clips if name != args.ours]
    prompts = sorted(set.intersection(*(set(named) for named in clips.values())))
    if not prompts:
        raise UserError(f"{args.clips}: no clip name is in the folder of every system")
    lone = sorted(set().union(*clips.values()).difference(prompts))
    out = Path(args.out)
    trials = design(
        opponents,
        prompts,
        n_judges=args.judges,
        trials_per_judge=args.trials or len(opponents),
        rng=np.random.default_rng(args.seed),
    )
    study = f"{out.name}-{args.seed}"
    stage("reading the clips")
    loaded = {
        (system, prompt): _load_clip(clips[system][prompt])
        for system in clips
        for prompt in prompts
    }
    warnings = _check_pairs(loaded, trials, args)
    if lone:
        warnings.append(f"{len(lone)} clips that not every system has are left out: {lone[0]}, …")
    if unheard := sorted(set(opponents) - {trial.opponent for trial in trials}):
        warnings.append(f"no judge hears {', '.join(unheard)}: ask for more --trials or --judges")
    out.mkdir(parents=True, exist_ok=True)
    stage("writing the pages")
    for judge in range(args.judges):
        questions = []
        for trial in (t for t in trials if t.judge == judge):
            sides = [loaded[args.ours, trial.prompt], loaded[trial.opponent, trial.prompt]]
            first, second = sides if trial.ours_first else reversed(sides)
            questions.append(Question(trial.id, first, second))
        write_judge_page(
            out / f"judge-{judge + 1:03d}.html",
            study=study,
            judge=f"{judge + 1:03d}",
            questions=questions,
            seconds=args.seconds,
            prompt_seconds=args.prompt_seconds,
        )
    key = {
        "format": KEY_FORMAT,
        "study": study,
        "ours": args.ours,
        "judges": args.judges,
        "made_by": args.command_line,
        "trials": [asdict(trial) for trial in trials],
    }
    write_atomically(out / "key.json", json.dumps(key, indent=1) + "\n")
    result = {
        "out": str(out),
        "judges": args.judges,
        "trials": len(trials),
        "prompts": len(prompts),
    }
    text = (
        f"{args.judges} pages with {len(trials)} pairs in {out}; give the judges judge-*.html and "
        "clips/ (if any), not key.json"
    )
    print_result(result, args.json, text, warnings)


def _check_pairs(
    loaded: "dict[tuple[str, str], Clip]", trials: "list[Trial]", args: argparse.Namespace
) -> list[str]:
    """Refuses pairs that begin differently; says which could not be compared."""
    from aria_jax.eval.comparison import same_prompt
    from data_pipeline.errors import UserError

    different, unchecked = [], 0
    for opponent, prompt in sorted({(trial.opponent, trial.prompt) for trial in trials}):
        one, other = (loaded[system, prompt].performance for system in (args.ours, opponent))
        if one is None or other is None:
            unchecked += 1
        elif not same_prompt(one, other, args.prompt_seconds):
            different.append(f"{prompt} ({args.ours} and {opponent})")
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(
            f"not the same music in the first {args.prompt_seconds:g} s of "
            f"{', '.join(different[:5])}{more}: both clips of a pair must begin with the prompt; "
            "--prompt-seconds says how long it is"
        )
    if not unchecked:
        return []
    return [f"{unchecked} pairs hold sound files, whose prompts were not compared: listen to them"]


def _find_clips(folder: Path) -> dict[str, dict[str, Path]]:
    """System -> prompt -> file."""
    from aria_jax.report.listening import AUDIO_SUFFIXES
    from data_pipeline.errors import UserError

    suffixes = (".mid", ".midi", *AUDIO_SUFFIXES)
    systems = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if len(systems) < 2:
        raise UserError(f"{folder}: expected a folder of clips for each of two systems or more")
    found: dict[str, dict[str, Path]] = {system.name: {} for system in systems}
    for system in systems:
        for path in sorted(p for p in system.iterdir() if p.suffix.lower() in suffixes):
            if other := found[system.name].get(path.stem):
                raise UserError(f"{path}: {other.name} is a clip of that name too; keep one")
            found[system.name][path.stem] = path
    return found


def _load_clip(path: Path) -> "Clip":
    from aria_jax.report.listening import AUDIO_SUFFIXES, Clip
    from data_pipeline.midi import read_midi, resolve_pedal

    if path.suffix.lower() in AUDIO_SUFFIXES:
        return Clip(sound=path)
    return Clip(performance=resolve_pedal(read_midi(path)))


# --- analyse -------------------------------------------------------------------------------------


def _analyse(args: argparse.Namespace) -> None:
    from aria_jax.eval.comparison import Trial, analyse
    from data_pipeline.errors import UserError

    key = _read_json(args.key)
    if key.get("format") != KEY_FORMAT:
        raise UserError(f"{args.key}: not the key of a listening test")
    trials = [Trial(**trial) for trial in key["trials"]]
    votes: dict[str, str] = {}
    judges: dict[int, str] = {}
    for path in args.votes:
        ballot = _read_json(path)
        try:
            study, judge, cast = ballot["study"], int(ballot["judge"]) - 1, dict(ballot["votes"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not a judge's votes") from None
        if study != key["study"]:
            raise UserError(f"{path}: votes of study {study!r}, not {key['study']!r}")
        if judge in judges:
            raise UserError(f"{path}: judge {judge + 1:03d} has voted already, in {judges[judge]}")
        own = {trial.id for trial in trials if trial.judge == judge}
        if strange := set(cast) - own:
            raise UserError(f"{path}: {sorted(strange)[0]} is no trial of judge {judge + 1:03d}")
        judges[judge] = path
        votes |= cast
    asked = [trial for trial in trials if trial.judge in judges]
    n_made = 1 + max(trial.judge for trial in trials)
    notes = []
    if len(judges) < n_made:
        notes.append(f"votes of {len(judges)} of the {n_made} judges that pages were made for")
    comparisons = analyse(asked, votes)
    more = [c.opponent for c in comparisons if c.wins + c.ties + c.losses > len(judges)]
    if more:
        notes.append(
            f"some judges heard {', '.join(more)} more than once: the sign test takes judgements "
            "as independent, and those of one person are not"
        )
    _print_comparisons(comparisons, args.json, len(judges), notes)


def _read_json(path: str) -> dict[str, Any]:
    from data_pipeline.errors import UserError, check_file

    try:
        file = check_file(path, "a JSON file of `aria-jax listening-test make` or its pages")
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not what `aria-jax listening-test make` or its pages write")
    return content


def _counts(args: argparse.Namespace) -> None:
    from aria_jax.eval.comparison import compare, fit_of_participants

    one = compare("the opponent", args.wins, args.ties, args.losses, n_judgements=args.judgements)
    note = None if args.participants is None else fit_of_participants(one, args.participants)
    _print_comparisons([one], args.json, None, [] if note is None else [note])


def _print_comparisons(
    comparisons: "list[Comparison]", as_json: bool, n_judges: int | None, notes: list[str]
) -> None:
    from aria_jax.cli.console import print_result

    lines = [] if n_judges is None else [f"{n_judges} judges"]
    lines += [f"{'against':<20} wins  ties  losses  p (sign test)  win rate, 95% interval"]
    for c in comparisons:
        rate = "-" if c.win_rate is None else f"{c.win_rate:.0%}"
        lines.append(
            f"{c.opponent:<20} {c.wins:4d}  {c.ties:4d}  {c.losses:6d}  {c.p_value:13.3g}  "
            f"{rate} ({c.low:.0%} to {c.high:.0%})"
        )
    result = {
        "judges": n_judges,
        "comparisons": [asdict(c) for c in comparisons],
        "notes": notes,
    }
    print_result(result, as_json, "\n".join([*lines, *(f"note: {note}" for note in notes)]))


# --- compare -------------------------------------------------------------------------------------


def _compare(args: argparse.Namespace) -> None:
    import numpy as np

    from aria_jax.cli.console import print_result, progress_bar, stage
    from aria_jax.eval.comparison import frechet_distance, music_statistics, summarise
    from data_pipeline.errors import UserError, about

    folders = {"generated": args.generated, "reference": args.reference}
    for folder in folders.values():
        if not Path(folder).is_dir():
            what = "a file is here, a folder" if Path(folder).exists() else "no such folder; one"
            raise UserError(f"{folder}: {what} of MIDI files is wanted")
    left_out: dict[str, None] = {}
    stage("reading the files")
    sets = {side: _performances(folder, left_out) for side, folder in folders.items()}
    summary = {
        side: summarise([music_statistics(performance) for performance in performances])
        for side, performances in sets.items()
    }
    result: dict[str, Any] = {
        side: {
            "n": len(sets[side]),
            **{name: {"mean": m, "std": s} for name, (m, s) in summary[side].items()},
        }
        for side in sets
    }
    lines = [
        f"{'mean ± standard deviation':<26} {len(sets['generated'])} generated".ljust(48)
        + f"{len(sets['reference'])} reference"
    ]
    for name in summary["generated"]:
        cells = [
            "{:9.3f} ± {:.3f}".format(*summary[side][name]) for side in ("generated", "reference")
        ]
        lines.append(f"{name.replace('_', ' '):<26} {cells[0]:<20} {cells[1]}")
    if args.checkpoint:
        stage("loading jax and embedding")
        from aria_jax.embed.encode import performance_encoder
        from data_pipeline.midi import compat_of

        with about(args.checkpoint):
            embed = performance_encoder(args.checkpoint)
        if compat := compat_of(embed.slicing.reading):  # as the model's corpus was read
            sets = {s: _performances(folder, left_out, compat) for s, folder in folders.items()}
        vectors: list[np.ndarray] = []
        total = sum(map(len, sets.values()))
        with progress_bar("embed", "file") as progress:
            for performance in itertools.chain(*sets.values()):
                progress(len(vectors), total)
                vectors.append(embed(performance))
        generated, reference = np.split(np.stack(vectors), [len(sets["generated"])])
        distance = frechet_distance(generated, reference)
        result["frechet_distance"] = distance
        lines.append(f"Fréchet distance of embeddings: {distance:.4f}")
    result["left_out"] = list(left_out)
    print_result(result, args.json, "\n".join(lines), [f"left out: {text}" for text in left_out])


def _performances(
    folder: str, left_out: dict[str, None], compat: str | None = None
) -> "list[Performance]":
    """Every readable MIDI file with notes under a folder; the rest is named in `left_out`."""
    from aria_jax.cli.convert import listed_midi
    from data_pipeline.errors import InvalidMidi, UserError
    from data_pipeline.midi import read_midi

    paths, reasons = listed_midi([folder])
    found = []
    for path in paths:
        try:
            performance = read_midi(path, compat=compat)
        except InvalidMidi as error:
            reasons.append(str(error))
            continue
        if len(performance.notes):
            found.append(performance)
        else:
            reasons.append(f"{path}: no notes")
    if not found:
        raise UserError(f"{folder}: nothing to compare: {'; '.join(reasons[:3])}")
    left_out |= dict.fromkeys(reasons)
    return found
