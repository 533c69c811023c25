"""`aria-jax convert`: weights from and to the published PyTorch checkpoints."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Convert published Aria weights (.safetensors: base, gen, embedding, classifier; float32, bfloat16
or float16) to a checkpoint that --checkpoint and --init-from take, or a checkpoint back. Sizes are
read from the tensors; only the number of heads must be given where it is not d_model / 64.

examples:
  aria-jax convert from-safetensors model.safetensors aria-medium
  aria-jax convert to-safetensors run1 model.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two directions."""
    verbs = parser.add_subparsers(
        dest="direction", required=True, metavar="{from-safetensors,to-safetensors}"
    )
    there = verbs.add_parser("from-safetensors", description="PyTorch weights to a checkpoint.")
    there.add_argument("source", help=".safetensors file")
    there.add_argument("out", help="folder to make")
    there.add_argument("--n-heads", type=int, help="default: d_model / 64")
    there.add_argument(
        "--class-names", default="", help="of a class head, comma-separated, in order"
    )
    there.add_argument("--tokenizer", default="aria", help="aria or pedal (aria)")
    back = verbs.add_parser("to-safetensors", description="A checkpoint to PyTorch weights.")
    back.add_argument("source", help="workdir of a run")
    back.add_argument("out", help=".safetensors file to write")


def run(args: argparse.Namespace) -> None:
    """Converts."""
    from aria_jax.interop.safetensors import export_model, import_model
    from aria_jax.train.checkpoint import load_model, save_model
    from data_pipeline.errors import UserError
    from data_pipeline.tokenizer import Tokenizer

    if args.direction == "from-safetensors":
        tokenizer = Tokenizer.preset(args.tokenizer)
        class_names = tuple(name for name in args.class_names.split(",") if name)
        model = import_model(args.source, n_heads=args.n_heads, class_names=class_names)
        if model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{args.source} has {model.config.vocab_size} tokens, the tokenizer "
                f"{args.tokenizer} {tokenizer.vocab_size}; choose another with --tokenizer"
            )
        save_model(args.out, model, tokenizer=args.tokenizer)
    else:
        if Path(args.out).suffix != ".safetensors":
            raise UserError(f"{args.out}: name a file that ends in .safetensors")
        model = load_model(args.source).model
        export_model(model, args.out)
    print(f"{args.out}: {model.config.n_params:,} parameters, {model.config.head} head")
