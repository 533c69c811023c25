"""From one form to another: `aria-jax convert` (published PyTorch weights, and adapters of a
finetuning run), `tokenize` and `detokenize` (MIDI files and token ids).
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from aria_jax.cli import (
    Verb,
    Writes,
    add_compat,
    add_overwrite,
    check_folder_name,
    check_suffix,
)

if TYPE_CHECKING:
    from aria_jax.models.heads import Model

DESCRIPTION = """\
Convert published Aria weights (.safetensors: base, gen, embedding, classifier, pedal demo; float32,
bfloat16 or float16) to a checkpoint that --checkpoint and --init-from take, or a checkpoint back.
Both options also take a .safetensors file as it is. Sizes are read from the tensors, the tokenizer
from the size of the vocabulary; only the number of heads must be given where it is not
d_model / 64.

A checkpoint is also one by its name on a hub, hf://OWNER/NAME[@REVISION], here as wherever
--checkpoint, --init-from or --base takes one; needs pip install 'aria-jax[hub]'. `to-hub` writes
the folder of such a repository: model.safetensors, config.json, and a card to complete.

Runs with lora_rank=… hold adapters and read the weights they belong to from their place. `merge`
writes the sum as a checkpoint that stands alone; `adapters` writes the adapters as one small file,
which `merge` adds to the same weights elsewhere.

examples:
  aria-jax convert from-safetensors model.safetensors aria-medium
  aria-jax convert to-safetensors run1 model.safetensors
  aria-jax convert to-hub run1/best my-model
  aria-jax convert merge run2 whole
  aria-jax convert adapters run2 style.safetensors
  aria-jax convert merge style.safetensors whole --base aria-medium"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be converted."""
    verbs = parser.add_subparsers(
        dest="direction",
        required=True,
        metavar="{from-safetensors,to-safetensors,to-hub,merge,adapters}",
    )
    there = verbs.add_parser("from-safetensors", description="PyTorch weights to a checkpoint.")
    there.add_argument("source", help=".safetensors file")
    there.add_argument("out", help="folder to make")
    there.add_argument("--n-heads", type=int, help="default: d_model / 64")
    there.add_argument(
        "--class-names", default="", help="of a class head, comma-separated, in order"
    )
    there.add_argument("--tokenizer", help="aria or pedal (that of the vocabulary's size)")
    back = verbs.add_parser("to-safetensors", description="A checkpoint to PyTorch weights.")
    back.add_argument("checkpoint", help="workdir of a run")
    back.add_argument("out", help=".safetensors file to write")
    repository = verbs.add_parser("to-hub", description="A checkpoint to a folder for a hub.")
    repository.add_argument("checkpoint", help="workdir of a run")
    repository.add_argument("out", help="folder to make, named as the repository will be")
    for verb in (back, repository):
        verb.add_argument(
            "--dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)"
        )
    back.add_argument(
        "--compact",
        action="store_true",
        help="of a model trained with model.vocabulary=corpus, only the rows of that vocabulary: "
        "smaller, and read by aria-jax alone",
    )
    merge = verbs.add_parser("merge", description="Adapters and their base to whole weights.")
    merge.add_argument("source", help="workdir of a run with adapters, or a file of adapters")
    merge.add_argument("out", help="folder to make")
    merge.add_argument("--base", metavar="C", help="weights that the adapters belong to")
    alone = verbs.add_parser("adapters", description="The adapters of a run as one file.")
    alone.add_argument("source", help="workdir of a run with adapters")
    alone.add_argument("out", help=".safetensors file to write")
    for verb in (there, back, repository, merge, alone):
        add_overwrite(verb)


def run(args: argparse.Namespace) -> None:
    """Converts."""
    from aria_jax.cli.console import stage

    stage("loading jax and the model")
    {
        "from-safetensors": _from_safetensors,
        "to-safetensors": _to_safetensors,
        "to-hub": _to_hub,
        "merge": _merge,
        "adapters": _adapters,
    }[args.direction](args)


CONVERT = Verb(
    DESCRIPTION,
    add_arguments,
    run,
    Writes(lambda args: [args.out], ("source", "checkpoint", "base")),
)


def _from_safetensors(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints.models import preset_of, save_model
    from aria_jax.checkpoints.safetensors import import_model, read_about
    from data_pipeline.errors import UserError
    from data_pipeline.midi import STANDARD

    if args.n_heads is not None and args.n_heads < 1:
        raise UserError(f"--n-heads {args.n_heads} must be at least 1")
    class_names = tuple(name for name in args.class_names.split(",") if name)
    check_folder_name(args.out)
    model = import_model(args.source, n_heads=args.n_heads, class_names=class_names)
    if class_names and model.config.head != "class":
        raise UserError(f"{args.source}: --class-names has no effect without a class head")
    tokenizer = preset_of(args.source, model.config.vocab_size, args.tokenizer)
    reading = read_about(args.source).get("reading", STANDARD)
    save_model(args.out, model, tokenizer=tokenizer, reading=reading)
    _report(args.out, model)


def _to_safetensors(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints.models import load_model
    from aria_jax.checkpoints.safetensors import export_model
    from data_pipeline.errors import UserError

    _check_file_name(args.out)
    loaded = load_model(args.checkpoint)
    if args.compact and not loaded.config.vocabulary:
        raise UserError(
            f"--compact has no effect on {args.checkpoint}: it was trained with the whole "
            "vocabulary (no model.vocabulary=corpus)"
        )
    about = loaded.about
    export_model(loaded.model, args.out, dtype=args.dtype, compact=args.compact, about=about)
    _report(args.out, loaded.model)


def _to_hub(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints import hub
    from aria_jax.checkpoints.models import load_model
    from aria_jax.checkpoints.safetensors import export_model
    from aria_jax.models import parameter_count
    from aria_jax.models.heads import parameter_specs
    from data_pipeline.artifact import write_atomically
    from data_pipeline.errors import UserError
    from data_pipeline.tokenizers import Tokenizer

    check_folder_name(args.out)
    loaded, folder = load_model(args.checkpoint), Path(args.out)
    if loaded.config.head == "none":
        raise UserError(f"{args.checkpoint}: has no head, so that nothing else would load it")
    tokenizer, about = Tokenizer.preset(loaded.tokenizer), loaded.about
    config = hub.hub_config(
        loaded.config, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, dtype=args.dtype
    )
    number = parameter_count(parameter_specs(loaded.config))
    card = hub.card(folder.absolute().name, loaded.config, number, about)
    folder.mkdir(parents=True, exist_ok=True)
    export_model(loaded.model, folder / hub.FILE, dtype=args.dtype, about=about)
    write_atomically(folder / hub.CONFIG, json.dumps(config, indent=2) + "\n")
    write_atomically(folder / hub.CARD, card)
    _report(args.out, loaded.model)


def _merge(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints.models import load_model, save_model
    from aria_jax.checkpoints.safetensors import load_lora
    from aria_jax.models.heads import split_model
    from aria_jax.models.lora import apply_lora
    from data_pipeline.errors import UserError

    check_folder_name(args.out)
    if Path(args.source).suffix != ".safetensors":
        loaded = load_model(args.source, base=args.base)
        if not loaded.adapted:
            raise UserError(
                f"{args.source}: trained all weights (no train.lora_rank): it has no adapters to "
                "merge, and stands alone already"
            )
        model = loaded.model
    elif args.base:
        loaded = load_model(args.base)
        merge, params = split_model(loaded.model)
        model = merge(apply_lora(params, load_lora(args.source)))
    else:
        raise UserError(f"{args.source}: name the weights these adapters belong to with --base")
    save_model(
        args.out,
        model,
        tokenizer=loaded.tokenizer,
        step=loaded.step,
        reading=loaded.reading,
    )
    _report(args.out, model)


def _adapters(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints.models import load_adapters
    from aria_jax.checkpoints.safetensors import save_lora
    from aria_jax.cli.console import say
    from data_pipeline.errors import UserError

    _check_file_name(args.out)
    if not Path(args.source).is_dir():
        raise UserError(f"{args.source}: the workdir of a run with train.lora_rank is wanted here")
    lora = load_adapters(args.source)
    save_lora(args.out, lora)
    say(f"{args.out}: {lora.n_params:,} parameters, adapters of rank {lora.rank}")


def _check_file_name(out: str) -> None:
    from data_pipeline.errors import UserError

    if Path(out).suffix != ".safetensors":
        raise UserError(f"{out}: name a file that ends in .safetensors")


def _report(out: str, model: "Model") -> None:
    from aria_jax.cli.console import say
    from aria_jax.models import parameter_count
    from aria_jax.models.heads import parameter_specs

    number = parameter_count(parameter_specs(model.config))
    say(f"{out}: {number:,} parameters, {model.config.head} head")


if TYPE_CHECKING:
    import numpy as np

_TOKENIZE = """\
Print the token ids of a MIDI file on one line, or as JSON {"ids": [...], "n_notes": N, "preset",
"reading": "standard" or "aria-utils", "repaired": why a truncated file was read in part, or ""}.

examples:
  aria-jax tokenize nocturne.mid
  aria-jax tokenize nocturne.mid --json > ids.json
  aria-jax tokenize half_a_download.mid --repair"""


def _tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax tokenize`."""
    parser.add_argument("file", help="MIDI file")
    parser.add_argument("--preset", default="aria", help="aria or pedal (default: aria)")
    parser.add_argument("--solo-piano", action="store_true", help="drop other instruments")
    add_compat(parser, "default: standard")
    parser.add_argument(
        "--repair", action="store_true", help="of a truncated file, take what is before the break"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _tokenize(args: argparse.Namespace) -> None:
    """Tokenises and prints."""
    from aria_jax.cli.console import note, print_result
    from data_pipeline.cleaning import Cleaning
    from data_pipeline.errors import UserError, about
    from data_pipeline.midi import STANDARD, compat_of, read_midi, reading_name
    from data_pipeline.tokenizers import Tokenizer

    tokenizer = Tokenizer.preset(args.preset)
    try:
        performance = read_midi(
            args.file, compat=compat_of(args.compat or STANDARD), repair=args.repair
        )
    except OSError as error:
        raise UserError(f"{args.file}: {error.strerror}") from None
    if performance.repaired:
        note(f"{args.file}: repaired: {performance.repaired}")
    performance = Cleaning(solo_piano=args.solo_piano).clean(performance)
    with about(args.file):
        ids = tokenizer.encode(performance).tolist()
    result = {
        "ids": ids,
        "n_notes": tokenizer.n_notes(ids),
        "preset": args.preset,
        "reading": reading_name(performance.compat),
        "repaired": performance.repaired,
    }
    print_result(result, args.json, " ".join(map(str, ids)))


TOKENIZE = Verb(_TOKENIZE, _tokenize_arguments, _tokenize)


_DETOKENIZE = """\
Write the MIDI file that token ids stand for. Reads what `aria-jax tokenize --json` and
`aria-jax generate --json` print, or a bare JSON list.

example:
  aria-jax detokenize ids.json out.mid"""


def _detokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax detokenize`."""
    parser.add_argument("ids", help='JSON file: [6, 0, ...] or {"ids": [6, 0, ...]}')
    parser.add_argument("out", help="MIDI file to write")
    parser.add_argument("--preset", default="aria", help="aria or pedal (default: aria)")
    add_overwrite(parser)


def _detokenize(args: argparse.Namespace) -> None:
    """Detokenises and writes."""
    from aria_jax.cli.console import say
    from data_pipeline.errors import UserError, about
    from data_pipeline.midi import write_midi
    from data_pipeline.tokenizers import Tokenizer

    check_suffix(args.out, "a MIDI file", ".mid", ".midi", ".kar")
    tokenizer, ids = Tokenizer.preset(args.preset), read_ids(args.ids)
    with about(args.ids):
        performance = tokenizer.decode(ids)
    if not len(performance.notes):
        raise UserError(
            f"{args.ids}: no notes in these tokens: a note is three, (instrument, pitch, velocity) "
            "(onset) (duration), and its instrument is announced before <S>"
        )
    try:
        write_midi(performance, args.out)
    except OSError as error:
        raise UserError(f"{args.out}: cannot write ({error.strerror})") from None
    say(f"{args.out}: {len(performance.notes)} notes")


DETOKENIZE = Verb(
    _DETOKENIZE, _detokenize_arguments, _detokenize, Writes(lambda args: [args.out], ("ids",))
)


def listed_midi(names: list[str]) -> tuple[list[Path], list[str]]:
    """Files, with folders replaced by the MIDI files in them; and what is not there."""
    from data_pipeline.build.sources import no_midi_files, walk_folder

    paths: list[Path] = []
    left_out = []
    for name in map(Path, names):
        if name.is_dir():
            inside = list(walk_folder(name))
            paths += [name / entry.path for entry in inside if not entry.fault]
            left_out += [
                f"{name / entry.path}: {entry.fault} ({entry.detail})"
                for entry in inside
                if entry.fault
            ]
            if not inside:
                left_out.append(str(no_midi_files(name)))
        elif name.is_file():
            paths.append(name)
        else:
            left_out.append(f"{name}: no such file")
    return paths, left_out


def check_midi(path: str) -> None:
    """Raises `UserError` for a path that no reading takes for a MIDI file: found early, cheaply."""
    from data_pipeline.errors import InvalidMidi
    from data_pipeline.midi import read_midi

    try:
        read_midi(path)
    except InvalidMidi as error:
        if error.reason == "not-midi":
            raise


def read_ids(path: str) -> "np.ndarray":
    """Token ids of a JSON file, int64; what `aria-jax tokenize --json` prints, or a bare list.

    Raises:
        UserError: something else.
    """
    import numpy as np

    from data_pipeline.errors import UserError, check_file

    try:
        content = json.loads(check_file(path, "a JSON file of token ids").read_text("utf-8"))
        ids = content["ids"] if isinstance(content, dict) else content
        if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]  # one continuation of `aria-jax generate --json`
        whole = isinstance(ids, list) and all(type(i) is int for i in ids)
    except (ValueError, KeyError, UnicodeDecodeError):
        whole = False
    if not whole:
        raise UserError(f'{path}: expected token ids as JSON, [6, 0, …] or {{"ids": [6, 0, …]}}')
    return np.array(ids, np.int64)
