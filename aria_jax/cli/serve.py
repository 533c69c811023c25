"""`aria-jax serve`: play a duet in the browser, and offer the models to programs."""

import argparse
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aria_jax.checkpoints import RELEASED_ENCODER, RELEASED_LM, model_path
from aria_jax.cli import Verb

if TYPE_CHECKING:
    from aria_jax.serve.app import Models
    from aria_jax.serve.jobs import Batcher

DESCRIPTION = """\
Play with a language model of piano music: open the page that this prints, play on a MIDI keyboard,
the computer's keys, by mouse or touch, and hand over; the model goes on from there. For programs,
http://127.0.0.1:8000/docs says how to tokenise, continue, embed and search.

Everything is compiled before the server says that it is ready. It listens to this machine alone;
at another --host everyone must show a --token. Sessions are saved as MIDI files, with what is
needed to play them again, when they end or when the server is stopped with Ctrl-C.

needs: pip install 'aria-jax[serve]'

examples:
  aria-jax serve                                       with the released mini
  aria-jax serve --checkpoint run1 --precision int8    a larger model of yours, in int8
  aria-jax serve --embedding-checkpoint run2 --embeddings emb.parquet
  aria-jax serve --host 0.0.0.0 --token "$(openssl rand -hex 16)" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax serve`."""
    add = parser.add_argument
    add("--checkpoint", default=RELEASED_LM, metavar="C", help=f"a language model ({RELEASED_LM})")
    # Its default is no promise: without these weights there are no endpoints for embeddings.
    add("--embedding-checkpoint", metavar="C", help=f"embeds performances ({RELEASED_ENCODER})")
    add("--embeddings", metavar="EMB", help="made by `aria-jax embed` with it, to search in")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    add("--port", type=int, default=8000, help="(8000; 0 takes any that is free)")
    add("--token", help="what everyone must show; needed at any other --host")
    add("--players", type=int, default=4, help="sessions at once (4)")
    add(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16", "int8"),
        help="of the weights (float32)",
    )
    add("--save", default="duets", metavar="DIR", help="where sessions are saved (duets)")


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    from aria_jax.cli.console import note, say, stage
    from data_pipeline.errors import UserError

    listening = _listen(args)
    stage("loading jax")
    try:
        import uvicorn
        import websockets  # noqa: F401

        from aria_jax.serve.app import make_app
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'aria-jax[serve]'") from None
    models = _models(args)
    port = listening.getsockname()[1]
    app = make_app(models, port=port, token=args.token)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        loop="asyncio",
        ws="websockets-sansio",
        ws_max_size=2 << 20,
        limit_concurrency=64,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
    )
    shown = f"?token={args.token}" if args.token else ""
    host = "127.0.0.1" if args.host in ("127.0.0.1", "localhost", "0.0.0.0", "::") else args.host
    memory = models.studio.engine.bytes_per_session / 2**20
    note(
        f"{args.players} players at most, {memory:.0f} MiB each; sessions are saved in {args.save}"
    )
    listening.listen(128)  # whoever comes from now on is served, if a moment later
    stage("")
    say(f"ready: http://{host}:{port}/{shown}   (for programs: /docs; Ctrl-C stops)")

    class Server(uvicorn.Server):
        """Ends after Ctrl-C without sending it again, which would count as the second one."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            numbers = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    Server(config).run(sockets=[listening])
    listening.close()
    saved = models.studio.saved
    say(f"stopped; {len(saved)} sessions saved" + (f" in {args.save}" if saved else ""))
    return 0


def _listen(args: argparse.Namespace) -> socket.socket:
    """The socket; before anything slow."""
    from data_pipeline.errors import UserError

    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.token:
        raise UserError(
            f"--host {args.host} can be reached from other machines: choose a --token that "
            "everyone must show, or leave --host out"
        )
    if args.token is not None and not (len(args.token) >= 8 and args.token.isalnum()):
        raise UserError("--token needs at least 8 letters and digits, and nothing else")
    if args.players < 1:
        raise UserError(f"--players {args.players} must be at least 1")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port} must lie in 0..65535")
    place = Path(args.save).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "you may not write here" if there.is_dir() else "a file is here"
        raise UserError(f"--save {args.save}: {what}; name a folder for the sessions")
    if args.embeddings:
        from aria_jax.embed.table import read_settings

        read_settings(Path(args.embeddings))
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((args.host, args.port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot listen at {args.host}:{args.port} ({error.strerror}); choose another --port"
        ) from None
    return listening


def _models(args: argparse.Namespace) -> "Models":
    from aria_jax.checkpoints.models import load_model
    from aria_jax.cli.console import progress_bar, stage
    from aria_jax.generate.live.engine import Engine
    from aria_jax.generate.weights import decoder_weights
    from aria_jax.models import parameter_count
    from aria_jax.models.heads import parameter_specs
    from aria_jax.serve.app import Models
    from aria_jax.serve.studio import Studio
    from data_pipeline.tokenizers import Tokenizer

    stage("loading the model")
    loaded = load_model(args.checkpoint)
    weights = decoder_weights(loaded.model, args.precision)
    engine = Engine(weights, Tokenizer.preset(loaded.tokenizer), players=args.players)
    n_params = parameter_count(parameter_specs(loaded.config))
    about = f"{args.checkpoint}, {n_params:,} parameters, {args.precision}"
    quiet = threading.Event()
    batcher, embeddings = _embedding(args, quiet)
    with progress_bar("compiling", "program") as bar:
        engine.warm(bar)
    studio = Studio(engine, loaded.reading, save_to=Path(args.save), about=about, quiet=quiet)
    return Models(studio, loaded.reading, batcher, embeddings)


def _embedding(
    args: argparse.Namespace, quiet: threading.Event
) -> "tuple[Batcher | None, Path | None]":
    """What embeds, and the file to search in.

    Args:
        quiet: whether nobody waits for music; nothing is embedded while it is not set.
    """
    from aria_jax.cli.console import note, progress_bar, stage
    from data_pipeline.errors import UserError, about

    name = args.embedding_checkpoint
    if name is None:
        try:
            model_path(RELEASED_ENCODER)
            name = RELEASED_ENCODER
        except UserError:
            if args.embeddings:
                raise UserError(
                    "--embeddings needs --embedding-checkpoint: the model that made them"
                ) from None
            note(f"no {RELEASED_ENCODER} here and no --embedding-checkpoint: nothing is embedded")
            return None, None
    stage("loading the embedding model")
    from aria_jax.embed.encode import encoder_of, performance_encoder
    from aria_jax.serve.jobs import MAX_HOLD_S, Batcher

    quiet.set()  # nobody plays yet
    before_batch = partial(quiet.wait, MAX_HOLD_S)
    made = Path(args.embeddings) if args.embeddings else None
    with about(name):
        if made is None:
            encoder = performance_encoder(name, before_batch=before_batch)
        else:
            encoder = encoder_of(made, name, before_batch=before_batch)
    batcher = Batcher(encoder)
    with progress_bar("compiling for embeddings", "program") as bar:
        batcher.warm(bar)
    return batcher, made


SERVE = Verb(DESCRIPTION, add_arguments, run)
