"""A page to listen to: prompts from MIDI files, and how a model goes on:
`python -m benchmarks.continuation_page PROMPTS --checkpoint MODEL --out page.html`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aria_jax.report import Provenance, Section, paragraph, write_page
from aria_jax.report.piano_roll import PLAYER_SCRIPT, Part, player
from benchmarks.eval_continuation import MIN_P, TEMPERATURE, Excerpt, by_model, excerpt, opened
from data_pipeline.errors import UserError
from data_pipeline.midi import Performance, read_midi
from data_pipeline.tokenizers import Tokenizer

VARIATIONS = 3


def places_in(
    folder: Path, tokenizer: Tokenizer, *, n: int, prompt_notes: int, notes: int
) -> list[Excerpt]:
    """The beginnings of `n` files, evenly chosen among those that are long enough.

    Raises:
        UserError: there are fewer.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    performances = [(file, read_midi(file)) for file in files]
    length = prompt_notes + notes
    fitting = [(file, p) for file, p in performances if len(p.notes) >= length]
    if len(fitting) < n:
        raise UserError(f"{folder}: {len(fitting)} MIDI files of {length} notes, {n} are needed")
    places = []
    for file, performance in (fitting[i * len(fitting) // n] for i in range(n)):
        ids, name = tokenizer.encode(performance).astype(int), file.stem.replace("_", " ")
        places.append(excerpt(name, ids, 0, prompt_notes, notes, tokenizer))
    return places


def section(place: Excerpt, made: Sequence[Performance], tokenizer: Tokenizer) -> Section:
    """A player for each continuation, then one for the piece itself."""
    prompt, body = tokenizer.decode(place.prompt), ""
    rows = {f"continuation {number}": one for number, one in enumerate(made, start=1)}
    for what, continuation in (*rows.items(), ("how the piece goes on", place.real)):
        first = continuation.notes["start"]
        marks = [(float(first.min()) / 1000, what)] if len(first) else []
        parts = [Part.of(prompt, "prompt"), Part.of(continuation, what)]
        body += f"<h3>{what}</h3>" + player(parts, marks=marks)
    return Section(place.name, body)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", help="folder of MIDI files")
    parser.add_argument("--checkpoint", required=True, help="a language model")
    parser.add_argument("--out", default="continuations.html", help="the page")
    parser.add_argument("--n", type=int, default=12, help="prompts (12)")
    parser.add_argument("--prompt-notes", type=int, default=80, help="notes of a prompt (80)")
    parser.add_argument("--notes", type=int, default=160, help="notes of a continuation (160)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    loaded = opened(args.checkpoint)
    tokenizer = Tokenizer.preset(loaded.tokenizer)
    sizes = {"prompt_notes": args.prompt_notes, "notes": args.notes}
    places = places_in(Path(args.prompts), tokenizer, n=args.n, **sizes)
    made = by_model(
        args.checkpoint, places, tokenizer, each=VARIATIONS, n_notes=args.notes, seed=args.seed
    )
    intro = PLAYER_SCRIPT + paragraph(
        f"{len(places)} beginnings of {args.prompt_notes} notes, and {VARIATIONS} continuations of "
        f"each by the model, of at most {args.notes} notes; none was chosen. The piece itself "
        "stands below them. Click into a roll to listen from there; the sound is a plain "
        "synthesiser of this page."
    )
    facts = {
        "model": f"{Path(args.checkpoint).name}, {loaded.step:,} steps ({loaded.fingerprint})",
        "sampling": f"temperature {TEMPERATURE}, min-p {MIN_P}, seed {args.seed}",
    }
    sections = [section(place, row, tokenizer) for place, row in zip(places, made, strict=True)]
    command = " ".join(["python -m benchmarks.continuation_page", *(argv or sys.argv[1:])])
    write_page(args.out, "Continuations to listen to", intro, sections, Provenance(command, facts))
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"continuation-page: {error}")
