"""`aria-jax embed`: one embedding per file."""

import argparse
import json
from pathlib import Path

DESCRIPTION = """\
Embed every MIDI file of a folder (or every piece of token shards): consecutive slices of 300
notes, each embedded at its <E> token, averaged per file. Writes Parquet: path, sha256, embedding,
n_slices, n_notes, duration_ms, labels. Files that cannot be read are named in OUT.rejected.jsonl;
the rest goes on.

--baseline embeds by counting instead, to hold a model against.

examples:
  aria-jax embed my_midis emb.parquet --checkpoint run2
  aria-jax embed my_data emb.parquet --checkpoint run2 --per-slice
  aria-jax embed my_data counts.parquet --baseline pitch-class"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax embed`."""
    parser.add_argument("source", help="folder of MIDI files, .tar of them, or token shards")
    parser.add_argument("out", help="Parquet file to write")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", help="workdir of a contrastive run")
    which.add_argument("--baseline", choices=("pitch-class", "statistics"), help="count instead")
    parser.add_argument("--slice-notes", type=int, default=300, help="notes of a slice (300)")
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens of a slice (2048)")
    parser.add_argument("--metadata", help="labels (default: metadata.json beside the files)")
    parser.add_argument("--per-slice", action="store_true", help="one row per slice")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args: argparse.Namespace) -> None:
    """Embeds and writes."""
    from aria_jax.cli.console import print_result, progress_bar
    from aria_jax.embed.table import write_embeddings
    from data_pipeline.errors import UserError
    from data_pipeline.tokenizer import Tokenizer

    if args.slice_notes < 1 or args.max_tokens < 2:
        raise UserError("--slice-notes must be at least 1 and --max-tokens at least 2")
    if not Path(args.source).exists():
        raise UserError(f"{args.source}: no such folder or archive")
    from aria_jax.embed.export import embed_pieces, model_encoder
    from aria_jax.embed.pieces import read_pieces

    max_tokens = args.max_tokens
    if args.checkpoint:
        from aria_jax.train.checkpoint import load_model

        loaded = load_model(args.checkpoint)
        tokenizer = Tokenizer.preset(loaded.tokenizer)
        encode, fingerprint = model_encoder(loaded.model, tokenizer.pad_id), loaded.fingerprint
        max_tokens = min(max_tokens, loaded.config.max_seq_len)
    else:
        from aria_jax.embed.baselines import baseline_encoder

        tokenizer = Tokenizer.preset("aria")
        encode, fingerprint = baseline_encoder(args.baseline, tokenizer), args.baseline
    rejected: list[dict[str, str]] = []
    n_files, pieces = read_pieces(
        args.source,
        tokenizer,
        slice_notes=args.slice_notes,
        max_tokens=max_tokens,
        metadata=args.metadata,
        reject=lambda path, reason, message: rejected.append(
            {"path": path, "stage": "embed", "reason": reason, "value": message}
        ),
    )
    with progress_bar("embed", "file") as progress:
        table = embed_pieces(
            pieces,
            encode,
            fingerprint=fingerprint,
            per_slice=args.per_slice,
            n_pieces=n_files,
            progress=progress,
        )
    write_embeddings(table, args.out)
    if rejected:
        lines = "".join(json.dumps(row) + "\n" for row in rejected)
        Path(args.out + ".rejected.jsonl").write_text(lines)
    result = {
        "out": args.out,
        "n_rows": len(table.path),
        "n_files": n_files,
        "n_rejected": len(rejected),
        "fingerprint": fingerprint,
    }
    text = f"{args.out}: {len(table.path)} rows of {table.embedding.shape[1]} numbers"
    if rejected:
        text += f"; {len(rejected)} of {n_files} files rejected, see {args.out}.rejected.jsonl"
    print_result(result, args.json, text)
