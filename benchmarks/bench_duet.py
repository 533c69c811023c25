"""How long a player waits for the answer: `python -m benchmarks.bench_duet [MIDI]`.

Real performances are replayed as players. At the hand-over the time until the first note is ready
is taken, with the prompt read while it was played and with all of it read then; after that, how
fast the model plays against real time. Both sides are measured in turn, in one process. With --live
some are played in real time through the server, as a page would, over its WebSocket.
"""

import argparse
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np

from aria_jax.checkpoints.models import load_model
from aria_jax.generate.live.engine import Engine
from aria_jax.generate.live.session import LiveSession
from aria_jax.generate.weights import decoder_weights
from data_pipeline.errors import UserError
from data_pipeline.midi import Performance, read_midi
from data_pipeline.sample import sample
from data_pipeline.tokenizers import Tokenizer

MUSIC_MS = 10_000
"""Of the model's, over which its speed is measured."""


def events_of(performance: Performance, seconds: float) -> list[dict]:
    """The first seconds of a performance as a player's events, in order."""
    notes = performance.notes
    starts, ends = performance.ms(notes["start"]), performance.ms(notes["end"])
    begin = starts.min()
    events = []
    for note, start, end in zip(notes, starts - begin, ends - begin, strict=True):
        pitch = int(note["pitch"])
        if start <= seconds * 1000 and 21 <= pitch <= 108:
            velocity = max(1, int(note["velocity"]))
            on = {"type": "note_on", "pitch": pitch, "velocity": velocity, "t": int(start)}
            events += [on, {"type": "note_off", "pitch": pitch, "t": int(min(end, seconds * 1000))}]
    for tick, value in zip(performance.pedals["tick"], performance.pedals["value"], strict=True):
        t = int(performance.ms(np.array([tick]))[0] - begin)
        if 0 <= t <= seconds * 1000:
            events.append({"type": "pedal", "value": int(value), "t": t})
    return sorted(events, key=lambda event: event["t"])


def hand_over_ms(engine: Engine, events: list[dict], chunked: bool) -> tuple[float, float, int]:
    """Time to the first note, speed against real time, and tokens of the context."""
    row = engine.take_row()
    session = LiveSession(engine, row, seed=0)
    if not chunked:
        session._reader.follow = lambda n_ids, chunk=0: None  # type: ignore[method-assign]
    for event in events:
        session.apply(event)
        while session.has_work(-1):
            session.step(-1)
    end = events[-1]["t"] + 20
    began = time.perf_counter()
    session.apply({"type": "hand_over", "t": end, "lead": 50})
    n_ids = len(session.ids)
    while not session.step(end + MUSIC_MS):
        pass
    first = time.perf_counter()
    while session.has_work(end + MUSIC_MS):
        session.step(end + MUSIC_MS)
    speed = (session.played_until - end) / 1000 / (time.perf_counter() - first)
    engine.give_back(row)
    return (first - began) * 1000, speed, n_ids


def live(engine: Engine, pieces: list[list[dict]]) -> dict[str, list[float]]:
    """Plays in real time through a server; ms until the first note is there, and late notes."""
    import uvicorn
    from websockets.sync.client import connect

    from aria_jax.serve.app import Models, make_app
    from aria_jax.serve.studio import Studio

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = make_app(Models(Studio(engine, "standard"), "standard"), port=port)
    config = uvicorn.Config(app, log_level="error", loop="asyncio", ws="websockets-sansio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    ready, heard, late = [], [], []
    for events in pieces:
        with connect(f"ws://127.0.0.1:{port}/duet", origin=f"http://127.0.0.1:{port}") as page:
            page.send(json.dumps({"type": "hello", "seed": 1}))
            began = time.monotonic()

            def now(began: float = began) -> float:
                return (time.monotonic() - began) * 1000

            for event in events:
                time.sleep(max(0, (event["t"] - now()) / 1000))
                page.send(json.dumps({**event, "t": int(now())}))
            handed = now()
            page.send(json.dumps({"type": "hand_over", "t": int(handed)}))
            while now() < handed + MUSIC_MS:
                try:
                    message = json.loads(page.recv(timeout=0.25))
                except TimeoutError:
                    page.send(json.dumps({"type": "clock", "t": int(now())}))
                    continue
                if message["type"] == "notes":
                    page.send(json.dumps({"type": "clock", "t": int(now())}))
                    late += [now() - note[3] for note in message["notes"]]
                    if message["first_ms"] is not None:
                        ready.append(now() - handed)
                        heard.append(message["notes"][0][3] - handed)
            page.send(json.dumps({"type": "bye", "t": int(now())}))
    server.should_exit = True
    thread.join()
    return {"ready": ready, "heard": heard, "late": late}


def spread(values: list[float]) -> str:
    """Median, 95th percentile and greatest."""
    return (
        f"median {np.median(values):6.1f}  p95 {np.quantile(values, 0.95):6.1f}  "
        f"max {max(values):6.1f}"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("midi", nargs="?", help="folder of performances (default: the sample)")
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--preset", help="instead: random weights of this size, e.g. medium")
    parser.add_argument("--seconds", type=float, default=25, help="of each performance (25)")
    parser.add_argument("--pieces", type=int, default=20, help="at most (20)")
    parser.add_argument("--repeats", type=int, default=2, help="hand-overs of each (2)")
    parser.add_argument("--live", type=int, default=3, help="played in real time (3)")
    args = parser.parse_args()
    weights, tokenizer = _weights(args)
    pieces = []
    for path in _files(args.midi):
        try:
            pieces.append(events_of(read_midi(path), args.seconds))
        except UserError as error:
            print(f"left out: {error}")
        if len(pieces) == args.pieces:
            break
    engine = Engine(weights, tokenizer, players=2)
    began = time.perf_counter()
    engine.warm()
    print(
        f"{args.preset or args.checkpoint} {args.precision}, {len(pieces)} performances; warm in "
        f"{time.perf_counter() - began:.1f} s; {engine.bytes_per_session / 2**20:.1f} MiB a session"
    )
    times: dict[bool, list[float]] = {True: [], False: []}
    speeds, lengths = [], []
    for events in pieces:
        for _ in range(args.repeats):
            for chunked in (True, False):
                ms, speed, n_ids = hand_over_ms(engine, events, chunked)
                times[chunked].append(ms)
                speeds.append(speed)
                lengths.append(n_ids)
    print(f"context: {min(lengths)} to {max(lengths)} tokens, median {np.median(lengths):.0f}")
    print(f"first note ready, ms, read while played:      {spread(times[True])}")
    print(f"first note ready, ms, read at the hand-over:  {spread(times[False])}")
    print(
        f"after that, times real time:                  median {np.median(speeds):6.1f}  "
        f"p5 {np.quantile(speeds, 0.05):6.1f}"
    )
    if args.live:
        found = live(engine, pieces[: args.live])
        print(f"through the server, {args.live} in real time:")
        print(f"  first note at the client, ms:               {spread(found['ready'])}")
        print(f"  first sound after the hand-over, ms:        {spread(found['heard'])}")
        n_late = sum(ms > 10 for ms in found["late"])
        print(f"  notes more than 10 ms late:                 {n_late} of {len(found['late'])}")


def _weights(args: argparse.Namespace) -> tuple:
    if not args.preset:
        loaded = load_model(args.checkpoint)
        return decoder_weights(loaded.model, args.precision), Tokenizer.preset(loaded.tokenizer)
    from flax import nnx

    from aria_jax.config import ComputeConfig
    from aria_jax.models.heads import build_model
    from aria_jax.presets import MODELS

    model = build_model(MODELS[args.preset], ComputeConfig(), rngs=nnx.Rngs(0))
    return decoder_weights(model, args.precision), Tokenizer.preset("aria")


def _files(folder: str | None) -> list[Path]:
    if folder is not None:
        return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    import tempfile

    made = Path(tempfile.mkdtemp(prefix="aria-jax-duet-"))
    sample(made, per_composer=5)
    return sorted(made.rglob("*.mid"))


if __name__ == "__main__":
    main()
