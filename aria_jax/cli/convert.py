"""`aria-jax convert`: published PyTorch weights, and adapters of a finetuning run."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aria_jax.cli import Verb, Writes, add_overwrite

if TYPE_CHECKING:
    from aria_jax.models.heads import Model

DESCRIPTION = """\
Convert published Aria weights (.safetensors: base, gen, embedding, classifier, pedal demo; float32,
bfloat16 or float16) to a checkpoint that --checkpoint and --init-from take, or a checkpoint back.
Sizes are read from the tensors, the tokenizer from the size of the vocabulary; only the number of
heads must be given where it is not d_model / 64.

Runs with lora_rank=… hold adapters and read the weights they belong to from their place. `merge`
writes the sum as a checkpoint that stands alone; `adapters` writes the adapters as one small file,
which `merge` adds to the same weights elsewhere.

examples:
  aria-jax convert from-safetensors model.safetensors aria-medium
  aria-jax convert to-safetensors run1 model.safetensors
  aria-jax convert merge run2 whole
  aria-jax convert adapters run2 style.safetensors
  aria-jax convert merge style.safetensors whole --base aria-medium"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be converted."""
    verbs = parser.add_subparsers(
        dest="direction",
        required=True,
        metavar="{from-safetensors,to-safetensors,merge,adapters}",
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
    back.add_argument("source", help="workdir of a run")
    back.add_argument("out", help=".safetensors file to write")
    merge = verbs.add_parser("merge", description="Adapters and their base to whole weights.")
    merge.add_argument("source", help="workdir of a run with adapters, or a file of adapters")
    merge.add_argument("out", help="folder to make")
    merge.add_argument("--base", metavar="C", help="weights that the adapters belong to")
    alone = verbs.add_parser("adapters", description="The adapters of a run as one file.")
    alone.add_argument("source", help="workdir of a run with adapters")
    alone.add_argument("out", help=".safetensors file to write")
    for verb in (there, back, merge, alone):
        add_overwrite(verb)


def run(args: argparse.Namespace) -> None:
    """Converts."""
    from aria_jax.cli.console import stage

    stage("loading jax and the model")
    {
        "from-safetensors": _from_safetensors,
        "to-safetensors": _to_safetensors,
        "merge": _merge,
        "adapters": _adapters,
    }[args.direction](args)


CONVERT = Verb(DESCRIPTION, add_arguments, run, Writes(lambda args: [args.out], ("source", "base")))


def _from_safetensors(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints.models import save_model
    from aria_jax.checkpoints.safetensors import import_model
    from data_pipeline.errors import UserError

    class_names = tuple(name for name in args.class_names.split(",") if name)
    model = import_model(args.source, n_heads=args.n_heads, class_names=class_names)
    if class_names and model.config.head != "class":
        raise UserError(f"{args.source}: --class-names has no effect without a class head")
    tokenizer = _tokenizer(args.source, model.config.vocab_size, args.tokenizer)
    save_model(args.out, model, tokenizer=tokenizer)
    _report(args.out, model)


def _tokenizer(source: str, vocab_size: int, asked: str | None) -> str:
    """The tokenizer preset of a model with so many tokens."""
    from data_pipeline.errors import UserError
    from data_pipeline.tokenizer import Tokenizer

    sizes = {name: Tokenizer.preset(name).vocab_size for name in ([asked] if asked else TOKENIZERS)}
    for name, size in sizes.items():
        if size == vocab_size:
            return name
    known = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise UserError(
        f"{source} has {vocab_size} tokens, but tokenizer {known}"
        + ("; choose another with --tokenizer" if asked else ": it was trained with another one")
    )


TOKENIZERS = ("aria", "pedal")


def _to_safetensors(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints.models import load_model
    from aria_jax.checkpoints.safetensors import export_model
    from data_pipeline.midi import STANDARD

    _check_file_name(args.out)
    loaded = load_model(args.source)
    export_model(loaded.model, args.out)
    if loaded.reading != STANDARD:
        print(
            f"aria-jax: warning: {args.out} does not say that its corpus was read by "
            f"{loaded.reading}; use it with --compat {loaded.reading}",
            file=sys.stderr,
        )
    _report(args.out, loaded.model)


def _merge(args: argparse.Namespace) -> None:
    from aria_jax.checkpoints.models import load_model, save_model
    from aria_jax.checkpoints.safetensors import load_lora
    from aria_jax.models.heads import split_model
    from aria_jax.models.lora import apply_lora
    from data_pipeline.errors import UserError

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

    _check_file_name(args.out)
    lora = load_adapters(args.source)
    save_lora(args.out, lora)
    print(f"{args.out}: {lora.n_params:,} parameters, adapters of rank {lora.rank}")


def _check_file_name(out: str) -> None:
    from data_pipeline.errors import UserError

    if Path(out).suffix != ".safetensors":
        raise UserError(f"{out}: name a file that ends in .safetensors")


def _report(out: str, model: "Model") -> None:
    from aria_jax.models.heads import parameter_specs
    from aria_jax.models.parameters import parameter_count

    number = parameter_count(parameter_specs(model.config))
    print(f"{out}: {number:,} parameters, {model.config.head} head")
