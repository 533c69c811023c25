"""The server as programs and pages meet it: a real one, on a port of its own."""

import asyncio
import base64
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import uvicorn
from jax import monitoring
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from aria_jax.embed.encode import performance_encoder
from aria_jax.embed.export import embed_pieces
from aria_jax.embed.pieces import Piece, open_source
from aria_jax.embed.search import Searcher
from aria_jax.embed.table import write_embeddings
from aria_jax.generate.live.session import replay
from aria_jax.serve.app import Models, make_app
from aria_jax.serve.guard import Guard, Rate
from aria_jax.serve.jobs import Batcher
from aria_jax.serve.studio import Studio
from data_pipeline.midi import midi_bytes, read_midi
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance


@contextmanager
def serving(models: Models, **guarded):
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    config = uvicorn.Config(
        make_app(models, port=port, **guarded),
        log_level="error",
        loop="asyncio",
        ws="websockets-sansio",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    yield port
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def models(duet_engine, tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    encoder = performance_encoder(tiny_models["encoder"])
    return Models(
        Studio(duet_engine, "standard", save_to=folder / "saved", about="a test"),
        "standard",
        Batcher(encoder),
    )


@pytest.fixture(scope="module")
def port(models):
    with serving(models) as port:
        yield port


@pytest.fixture
def duet(port):
    """Connects, says hello and gives a connection with `say` and `until`."""
    open_ = []

    def begin(session: str | None = None, seed: int | None = 1):
        socket = connect(f"ws://127.0.0.1:{port}/duet", origin=f"http://127.0.0.1:{port}")
        page = Page(socket)
        open_.append(page)
        page.say("hello", session=session, seed=seed)
        page.welcome = page.until("welcome", "full")
        return page

    yield begin
    for page in open_:
        page.leave()


class Page:
    """A page without a browser."""

    def __init__(self, socket) -> None:
        self.socket, self.began, self.heard = socket, time.monotonic(), []

    def now(self) -> int:
        return int((time.monotonic() - self.began) * 1000)

    def say(self, type: str, **rest) -> None:
        timed = {} if type == "hello" else {"t": self.now()}
        self.socket.send(json.dumps({"type": type, **timed, **rest}))

    def until(self, *types: str, seconds: float = 20) -> dict:
        while True:
            message = json.loads(self.socket.recv(timeout=seconds))
            self.heard.append(message)
            if message["type"] in types:
                return message

    def play(self, n: int = 4) -> None:
        for i in range(n):
            self.say("note_on", pitch=60 + i, velocity=70)
            time.sleep(0.01)
            self.say("note_off", pitch=60 + i)

    def leave(self) -> None:
        with suppress(ConnectionClosed, TimeoutError):
            self.say("bye")
            self.until("ended", seconds=5)
        self.socket.close()


def test_a_duet_from_hello_to_the_saved_file(duet, models, duet_engine):
    page = duet()
    assert page.welcome["turn"] == "player" and not page.welcome["resumed"]
    page.play()
    page.say("hand_over")
    turn = page.until("turn")
    assert turn["turn"] == "model" and turn["can_undo"]
    first = page.until("notes")
    assert first["first_ms"] > 0 and first["notes"][0][3] >= turn["t"]
    page.say("settings", temperature=0.8, density=1)
    keep = page.until("keep")
    later = page.until("notes")
    assert later["notes"][0][0] >= keep["keep"] or not later["notes"]
    page.say("note_on", pitch=50, velocity=60)  # playing takes over
    assert page.until("turn")["turn"] == "player"
    page.say("note_off", pitch=50)
    page.say("save")
    midi = read_midi(base64.b64decode(page.until("midi")["data"]))
    mine = midi.notes["pitch"][midi.notes["channel"] == 0]
    assert mine.tolist() == [60, 61, 62, 63, 50]
    page.leave()
    saved = models.studio.saved[-1]
    assert (read_midi(saved).notes["channel"] == 0).sum() == 5
    # What is saved beside it plays the session again.
    record = json.loads(saved.with_suffix(".json").read_text())
    row = duet_engine.take_row()
    again = replay(duet_engine, row, record["events"], seed=record["seed"])
    assert again.n_turns == 1
    assert Tokenizer.preset("aria").decode(np.array(again.ids)).notes["pitch"][-1] == 50
    duet_engine.give_back(row)


def test_other_answers_and_taking_back(duet):
    page = duet()
    page.play()
    page.say("settings", length_ms=10_000)  # this model may be silent for 5 s
    page.say("hand_over")
    page.until("notes")
    page.say("takes")
    takes = page.until("takes")["takes"]
    assert len(takes) == 3
    assert all(0 <= note[3] < 10_000 for take in takes for note in take)
    page.say("choose", take=1)
    page.say("save")
    midi = read_midi(base64.b64decode(page.until("midi")["data"]))
    chosen = midi.notes[midi.notes["channel"] == 1]
    notes = [note for note in takes[1] if note[1] is not None]  # without pedal events
    assert sorted(chosen["pitch"].tolist()) == sorted(note[1] for note in notes)
    page.say("undo")
    while [one["can_undo"] for one in page.heard if one["type"] == "turn"][-1]:
        page.until("turn")
    page.say("undo")  # there is none any more: nothing happens
    page.say("load", data=base64.b64encode(b"MThd, but no MIDI file").decode())
    assert "MIDI" in page.until("error")["message"]
    piece = random_performance(np.random.default_rng(0), 20)
    page.say("load", data=base64.b64encode(midi_bytes(piece)).decode(), seconds=600)
    assert len(page.until("loaded")["rows"]) == 20


def test_a_lost_connection_is_taken_up_again(duet):
    page = duet()
    page.play()
    page.say("hand_over")
    page.until("notes")
    page.socket.close()
    again = duet(session=page.welcome["session"])
    again.began = page.began
    assert again.welcome["resumed"] and again.welcome["turn"] == "model"
    assert again.welcome["answer"] and len(again.welcome["history"]) > 4
    assert again.until("notes")["turn"] == 1


def test_a_full_house_says_so(duet):
    pages = [duet() for _ in range(4)]
    assert {page.welcome["type"] for page in pages} == {"welcome"}
    late = duet()
    assert late.welcome["type"] == "full" and "4 places" in late.welcome["message"]
    pages[0].leave()
    assert duet().welcome["type"] == "welcome"


def test_nonsense_is_answered_and_floods_are_closed(duet):
    page, other = duet(), duet()
    for text in ("", "{", "[" * 5000, '{"type":"note_on","t":1e999}', '{"type":"x"}', "null"):
        page.socket.send(text)
        page.until("error")
    page.socket.send(b"\x00\xff")
    page.until("error")
    page.play(1)
    with pytest.raises(ConnectionClosed):
        for _ in range(5000):
            page.say("clock")
        while True:
            page.until("never")
    other.play(1)
    other.say("hand_over")
    assert other.until("notes")["notes"]


def test_only_the_servers_own_page_may_connect(port):
    with pytest.raises(InvalidStatus):
        connect(f"ws://127.0.0.1:{port}/duet", origin="http://evil.example")
    with pytest.raises(urllib.error.HTTPError, match="421"):
        request(port, "/", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        request(port, "/v1/tokenise", b"", headers={"Origin": "http://evil.example"})
    for path in ("/../app.py", "/%2e%2e/app.py", "/..%2fapp.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            request(port, path)


def request(port: int, path: str, body: bytes | None = None, headers: dict | None = None) -> bytes:
    kind = {"Content-Type": "audio/midi"} if body is not None else {}
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=body, headers={**kind, **(headers or {})}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read()


def test_programs_tokenise_continue_and_find_out_how(port):
    piece = random_performance(np.random.default_rng(1), 30)
    found = json.loads(request(port, "/v1/tokenise", midi_bytes(piece)))
    piece = read_midi(midi_bytes(piece))  # a file cannot hold two notes of one key
    assert found["ids"] == Tokenizer.preset("aria").encode(piece).tolist()
    asked = {
        "midi": base64.b64encode(midi_bytes(piece)).decode(),
        "prompt_seconds": 600,
        "seconds": 5,
        "seed": 3,
    }
    answers = [
        request(
            port, "/v1/continue", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        for _ in range(2)
    ]
    assert answers[0] == answers[1]  # the same seed
    *lines, last = [json.loads(line) for line in answers[0].splitlines()]
    notes = [note for line in lines for note in line["notes"]]
    assert len(read_midi(base64.b64decode(last["midi"])).notes) == 30 + len(notes)
    paths = json.loads(request(port, "/openapi.json"))["paths"]
    assert {"/v1/info", "/v1/tokenise", "/v1/continue", "/v1/embed"} <= set(paths)
    with pytest.raises(urllib.error.HTTPError, match="422"):
        request(port, "/v1/tokenise", b"no MIDI file")
    with pytest.raises(urllib.error.HTTPError, match="413"):
        request(port, "/v1/tokenise", b"x" * (3 << 19))
    with pytest.raises(urllib.error.URLError):  # not even read
        request(port, "/v1/tokenise", b"x" * (3 << 20))


def test_embeddings_share_batches(port, models):
    pieces = [random_performance(np.random.default_rng(i), 20 + i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda piece: json.loads(request(port, "/v1/embed", midi_bytes(piece))), pieces
            )
        )
    for piece, answer in zip(pieces, answers, strict=True):
        alone = models.batcher.encoder(read_midi(midi_bytes(piece)))
        np.testing.assert_allclose(answer["embedding"], alone, atol=1e-5)  # other batch shapes
    assert max(models.batcher.batches) > 1


def test_an_encoder_of_fixed_shapes_compiles_nothing_once_it_is_warm(tiny_models):
    held_up = []
    encoder = performance_encoder(
        tiny_models["encoder"], max_tokens=250, before_batch=lambda: held_up.append(1)
    )
    batcher = Batcher(encoder)
    batcher.warm()
    n_warm, compiled = len(held_up), []

    def listener(name: str, duration: float, **rest) -> None:
        compiled.extend([name] * ("compile" in name))

    pieces = [random_performance(np.random.default_rng(i), 3 + 30 * i) for i in range(4)]
    monitoring.register_event_duration_secs_listener(listener)
    try:
        found = [batcher.submit(piece).result(timeout=60) for piece in pieces]
        together = [batcher.submit(piece) for piece in pieces]
        found += [one.result(timeout=60) for one in together]
    finally:
        monitoring.unregister_event_duration_listener(listener)
    assert not compiled and len(held_up) > n_warm
    plain = performance_encoder(tiny_models["encoder"], max_tokens=250)
    expected = [plain(piece) for piece in pieces]
    np.testing.assert_allclose(found, expected * 2, atol=1e-5)  # other batch shapes


def test_more_requests_than_anyone_needs_are_told_to_wait():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard, answers = Guard(app, port=8000, make_rate=lambda: Rate(0.001, 5)), []

    async def send(message):
        answers.append(message)

    for client in ["10.0.0.1"] * 7 + ["10.0.0.2"]:
        scope = {"type": "http", "client": (client, 1), "headers": [(b"host", b"localhost:8000")]}
        asyncio.run(guard(scope, None, send))
    assert [one["status"] for one in answers if "status" in one] == [200] * 5 + [429] * 2 + [200]
    assert (b"retry-after", b"1") in answers[5]["headers"]
    assert b"too many requests" in answers[6]["body"]


@pytest.mark.parametrize("index", [None, "exact"])
def test_search_and_token(duet_engine, models, tmp_path, monkeypatch, index):
    folder = tmp_path / "midis"
    folder.mkdir()
    for i in range(3):
        piece = random_performance(np.random.default_rng(i), 20)
        (folder / f"{i}.mid").write_bytes(midi_bytes(piece))
    encoder = models.batcher.encoder
    source = open_source(folder, encoder.slicing, spool=tmp_path / "spool")
    found = [one for i in range(3) if isinstance(one := source.piece(i), Piece)]
    table = embed_pieces(found, encoder.encode, pool="mean", fingerprint=encoder.fingerprint)
    write_embeddings(table, tmp_path / "emb.parquet")
    if index:  # as `aria-jax search --index` leaves it
        Searcher(tmp_path / "emb.parquet", index)
        monkeypatch.delattr("aria_jax.serve.app.search")
    offered = Models(
        Studio(duet_engine, "standard"), "standard", models.batcher, tmp_path / "emb.parquet"
    )
    with serving(offered, token="correct1horse") as port:
        query = (folder / "1.mid").read_bytes()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            request(port, "/v1/search?k=2", query)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            request(port, "/v1/search?k=2", query, {"Authorization": "Bearer wrong"})
        shown = {"Authorization": "Bearer correct1horse"}
        hits = json.loads(request(port, "/v1/search?k=2", query, shown))["hits"]
        assert hits[0]["path"] == "1.mid" and len(hits) == 2
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{port}/duet")
        connect(f"ws://127.0.0.1:{port}/duet?token=correct1horse").close()
