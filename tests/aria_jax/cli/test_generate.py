"""`generate` and `score` as a user runs them."""

import gzip
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from flax import nnx

from aria_jax.checkpoints.models import save_model
from aria_jax.cli.main import main
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import build_model
from data_pipeline.midi import NOTE, PROGRAM, Performance, read_midi, write_midi
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import INSTRUMENTS

ARIA = Tokenizer.preset("aria")


def save(path, seed=0, **config):
    config = ModelConfig(d_model=16, n_heads=2, n_layers=1, **{"max_seq_len": 512} | config)
    save_model(path, build_model(config, ComputeConfig(), rngs=nnx.Rngs(seed)))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and a piece of 40 notes, one every half second."""
    folder = tmp_path_factory.mktemp("generate")
    save(folder / "lm")
    save(folder / "conditioned", emb_size=8)
    save(folder / "embedder", head="embedding", emb_size=8)
    save(folder / "other-embedder", head="embedding", emb_size=4)
    notes = np.zeros(40, NOTE)
    notes["start"] = np.arange(40) * 500
    notes["end"] = notes["start"] + 400
    notes["pitch"], notes["velocity"] = 50 + np.arange(40) % 20, 70
    write_midi(Performance(500, notes), folder / "piece.mid")
    notes["channel"] = np.arange(40) % 2
    programs = np.array([(0, 0, 0), (0, 32, 1)], PROGRAM)
    write_midi(Performance(500, notes, programs=programs), folder / "duo.mid")
    return folder


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_files_for_each_continuation(folder, capsys, tmp_path):
    status, out, err = run(
        capsys, "generate", "--checkpoint", folder / "lm", "--prompt", folder / "piece.mid",
        "--seconds", 4, "--n", 2, "--max-tokens", 40, "--out", tmp_path,
    )  # fmt: skip
    assert status == 0 and "notes/s" in err and "real time" in err
    names = {path.name for path in tmp_path.iterdir()}
    kinds = (".mid", "-continuation.mid", ".png")
    assert names == {f"piece-{i}{kind}" for i in (1, 2) for kind in kinds} | {"piece.html"}
    for i in (1, 2):
        whole = read_midi(tmp_path / f"piece-{i}.mid").notes
        assert whole["start"][:9].tolist() == list(range(0, 4001, 500))  # the prompt as played
        assert whole["pitch"][:9].tolist() == list(range(50, 59))
        alone = read_midi(tmp_path / f"piece-{i}-continuation.mid").notes
        assert 0 < len(alone) <= len(whole) - 9 + 1
        assert (tmp_path / f"piece-{i}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"piece-{i}.mid" in out
    page = (tmp_path / "piece.html").read_text()
    assert page.count('class="player"') == 2 and "src=" not in page and "http" not in page
    assert "aria-jax generate <span>--checkpoint</span>" in page  # how to make it again
    for fact in (
        "prompt",
        "9 notes of",
        "checkpoint step",
        "seed",
        "temperature 0.98, min-p 0.035",
    ):
        assert fact in page


def test_tracks_that_are_given_stand_in_the_files(folder, capsys, tmp_path):
    status, out, _ = run(
        capsys, "generate", "--checkpoint", folder / "lm", "--prompt", folder / "duo.mid",
        "--seconds", 4, "--max-tokens", 60, "--given", "bass", "--out", tmp_path, "--json",
    )  # fmt: skip
    found = json.loads(out)
    (ids,), (marks,), (files,) = found["ids"], found["is_given"], found["files"]
    assert status == 0 and found["given"] == ["bass"] and len(marks) == len(ids)
    whole, own = (read_midi(files[kind]) for kind in ("midi", "continuation"))
    heads = np.isin(ARIA.instrument[ids], INSTRUMENTS.index("bass"))
    assert (heads == heads & marks).all()  # no other note of the bass
    n_bass = 4 + heads.sum()
    bass = read_midi(folder / "duo.mid", of_tracks=(2,)).notes[:n_bass]
    assert sum(marks) == 3 * heads.sum() > 0
    for name in ("pitch", "velocity", "start", "end"):
        assert whole.notes[whole.notes["channel"] == 1][name].tolist() == bass[name].tolist()
    assert set(own.notes["channel"].tolist()) == {0} and found["n_notes"] == [len(own.notes)]
    page = (tmp_path / "duo.html").read_text()
    assert "bass (given)" in page and "with bass as given" in page and "piano (given)" not in page


def parsed_by_others(path):
    """Sorted (pitch, velocity, onset tick) as mido and miditoolkit read them."""
    import mido
    from miditoolkit import MidiFile

    clock, heard = 0, []
    for message in mido.merge_tracks(mido.MidiFile(path).tracks):
        clock += message.time
        if message.type == "note_on" and message.velocity > 0:
            heard.append((message.note, message.velocity, clock))
    tracks = MidiFile(str(path)).instruments
    listed = [(n.pitch, n.velocity, n.start) for track in tracks for n in track.notes]
    return sorted(heard), sorted(listed)


@pytest.mark.parametrize("prompt", ["nocturne.mid", "waltz.mid"])
def test_prompts_of_the_reference_are_continued(prompt, folder, capsys, tmp_path, real_midi):
    status, out, _ = run(
        capsys, "generate", "--checkpoint", folder / "lm",
        "--prompt", real_midi / "prompts" / prompt, "--notes", 40, "--max-tokens", 60,
        "--out", tmp_path, "--json",
    )  # fmt: skip
    (files,), n_notes = json.loads(out)["files"], json.loads(out)["n_notes"][0]
    whole, alone = (read_midi(files[kind]).notes for kind in ("midi", "continuation"))
    assert status == 0 and n_notes == 20 and len(whole) == 40 + 20 and len(alone) == 20
    for kind, notes in (("midi", whole), ("continuation", alone)):
        read = sorted(notes[["pitch", "velocity", "start"]].tolist())
        assert parsed_by_others(files[kind]) == (read, read)


def test_json_seeds_and_grammar(folder, capsys, tmp_path):
    def ids(*more):
        status, out, _ = run(
            capsys, "generate", "--checkpoint", folder / "lm", "--max-tokens", 30, "--json", *more
        )
        assert status == 0
        return json.loads(out)

    first = ids("--n", 2)
    assert first["prompt_ids"] == [ARIA.id_of(("prefix", "instrument", "piano")), ARIA.bos_id]
    assert ids("--n", 2)["ids"] == first["ids"]
    assert ids("--n", 1)["ids"] == first["ids"][:1]
    assert ids("--n", 1, "--seed", 7)["ids"] != first["ids"][:1]
    free = ids("--no-grammar")["ids"][0]
    kinds = ARIA.kind[free]
    assert len(set(kinds[::3].tolist())) > 1  # an untrained model knows no order of its own
    (tmp_path / "ids.json").write_text(json.dumps({"ids": first["prompt_ids"] + first["ids"][0]}))
    if ARIA.eos_id not in first["ids"][0]:
        more = ids("--prompt-ids", tmp_path / "ids.json", "--temperature", 0)
        assert more["prompt_ids"][-30:] == first["ids"][0]
        assert len(more["ids"][0]) <= 30


def test_conditioned_on_another_piece(folder, capsys):
    status, out, _ = run(
        capsys, "generate", "--checkpoint", folder / "conditioned", "--embedding",
        folder / "piece.mid", "--embedding-checkpoint", folder / "embedder", "--cfg", 2,
        "--max-tokens", 12, "--json",
    )  # fmt: skip
    assert status == 0 and len(json.loads(out)["ids"][0]) > 0


def test_wav_names_its_package(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "symusic", None)
    (tmp_path / "font.sf2").write_bytes(b"")
    status, _, err = run(
        capsys, "generate", "--checkpoint", folder / "lm", "--max-tokens", 12, "--out",
        tmp_path / "out", "--wav", tmp_path / "font.sf2",
    )  # fmt: skip
    assert status == 2 and "pip install" in err and "symusic" in err


@pytest.mark.slow
def test_less_room_than_asked_is_said_before(folder, capsys, tmp_path):
    """40 notes are 123 tokens of 512: 388 can follow, however many were asked for."""
    arguments = (
        "generate", "--checkpoint", folder / "lm", "--prompt", folder / "piece.mid",
        "--notes", 40, "--max-tokens", 420,
    )  # fmt: skip
    status, out, err = run(capsys, *arguments, "--json")
    prompt = len(json.loads(out)["prompt_ids"])
    room = 512 - prompt - 1
    assert status == 0 and json.loads(out)["max_tokens"] == room
    said = f"takes {prompt} of the 512 tokens that the model sees, so that only {room} of 420"
    assert said in err and err.index(said) < err.index("notes/s")
    assert "--seconds" in err and "--sliding" in err
    status, out, err = run(capsys, *arguments, "--sliding", "--json")
    found = json.loads(out)
    assert status == 0 and "warning" not in err and found["warnings"] == []
    assert found["ended"][0] or len(found["ids"][0]) == 420


def test_a_file_without_notes_is_no_prompt(folder, capsys, tmp_path):
    write_midi(Performance(500, np.zeros(0, NOTE)), tmp_path / "silent.mid")
    arguments = ("generate", "--checkpoint", folder / "lm", "--max-tokens", 12)
    status, _, err = run(capsys, *arguments, "--prompt", tmp_path / "silent.mid", "--out",
                         tmp_path / "out")  # fmt: skip
    assert status == 2 and "silent.mid" in err and "no" in err and "notes" in err
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "no seconds of a prompt": (
        ["--checkpoint", "{f}/lm", "--json", "--prompt", "{f}/piece.mid", "--seconds", "0"],
        "0.0 seconds holds nothing"),
    "no notes of a prompt": (
        ["--checkpoint", "{f}/lm", "--json", "--prompt", "{f}/piece.mid", "--notes", "0"],
        "0 notes holds nothing"),
    "seconds of no prompt": (
        ["--checkpoint", "{f}/lm", "--json", "--seconds", "5"], "--seconds has no effect without"),
    "tracks of nothing": (
        ["--checkpoint", "{f}/lm", "--json", "--given", "bass"], "--given has no effect without"),
    "played with nothing": (
        ["--checkpoint", "{f}/lm", "--json", "--prompt", "{f}/duo.mid", "--play", "bass"],
        "--play has no effect without --given"),
    "an ending beside given tracks": (
        ["--checkpoint", "{f}/lm", "--json", "--prompt", "{f}/duo.mid", "--given", "bass", "--end"],
        "cannot go with --given"),
    "no such track": (
        ["--checkpoint", "{f}/lm", "--json", "--prompt", "{f}/duo.mid", "--given", "flute"],
        "no track or instrument 'flute'; its tracks are track 2, track 3, its instruments piano"),
    "guidance by nothing": (
        ["--checkpoint", "{f}/lm", "--json", "--cfg", "2"], "--cfg has no effect without"),
    "a model that embeds nothing": (
        ["--checkpoint", "{f}/lm", "--json", "--embedding-checkpoint", "{f}/embedder"],
        "no effect without --embedding"),
    "a window without penalty": (
        ["--checkpoint", "{f}/lm", "--json", "--repetition-window", "9"], "--repetition-penalty"),
    "sound without files": (
        ["--checkpoint", "{f}/lm", "--json", "--wav", "{f}/piece.mid"], "--wav has no effect"),
    "greedy and cut": (
        ["--checkpoint", "{f}/lm", "--json", "--temperature", "0", "--top-k", "9"],
        "--top-k has no effect"),
    "nowhere to save": (["--checkpoint", "{f}/lm"], "--out"),
    "no prompt file": (
        ["--checkpoint", "{f}/lm", "--json", "--prompt", "{f}/no.mid"], "no such file"),
    "two ways to cut": (
        ["--checkpoint", "{f}/lm", "--json", "--top-p", "0.9", "--min-p", "0.1"], "at most one"),
    "no room to end": (
        ["--checkpoint", "{f}/lm", "--json", "--end", "--max-tokens", "100"], "ending needs room"),
    "no adapter": (
        ["--checkpoint", "{f}/lm", "--json", "--embedding", "{f}/piece.mid",
         "--embedding-checkpoint", "{f}/embedder"], "takes no embedding"),
    "embedding without its model": (
        ["--checkpoint", "{f}/conditioned", "--json", "--embedding", "{f}/piece.mid"],
        "--embedding-checkpoint"),
    "another embedding": (
        ["--checkpoint", "{f}/conditioned", "--json", "--embedding", "{f}/piece.mid",
         "--embedding-checkpoint", "{f}/other-embedder"], "embeds in 4 numbers"),
    "no language model": (["--checkpoint", "{f}/embedder", "--json"], "head 'embedding'"),
    "no such axis": (["--checkpoint", "{f}/lm", "--json", "--mesh", "tensr=2"], "tensor"),
    "none at all": (["--checkpoint", "{f}/lm", "--json", "--n", "0"], "at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, folder, capsys):
    arguments, message = MISTAKES[name]
    status, _, err = run(capsys, "generate", *(part.format(f=folder) for part in arguments))
    assert status == 2 and message in err and "Traceback" not in err


@pytest.mark.slow
def test_mesh(folder, capsys):
    arguments = ("generate", "--checkpoint", folder / "lm", "--max-tokens", 12, "--json", "--n", 4)
    _, plain, _ = run(capsys, *arguments)
    status, spread, _ = run(capsys, *arguments, "--mesh", "data=4,tensor=2")
    assert status == 0 and json.loads(spread)["ids"] == json.loads(plain)["ids"]


def test_score(folder, capsys, tmp_path):
    (tmp_path / "not.mid").write_text("no")
    ids = ARIA.encode(read_midi(folder / "piece.mid")).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    status, out, err = run(
        capsys, "score", folder / "piece.mid", tmp_path / "not.mid", tmp_path / "ids.json",
        "--checkpoint", folder / "lm", "--json",
    )  # fmt: skip
    assert status == 1 and "not.mid" in err and "1 of 3" in err
    midi, plain = map(json.loads, out.splitlines())
    assert midi["nll"] == plain["nll"] and midi["n_tokens"] == len(midi["nll"]) == len(ids) - 1
    assert midi["mean_nll"] == pytest.approx(np.mean(midi["nll"]), rel=1e-5)
    assert len(midi["notes"]) == 40
    odd = tmp_path / "folder" / "Pr\udce9lude.mid.gz"
    odd.parent.mkdir()
    odd.write_bytes(gzip.compress((folder / "piece.mid").read_bytes()))
    (odd.parent / "gone.mid").symlink_to("nowhere")
    status, out, err = run(capsys, "score", odd.parent, "--checkpoint", folder / "lm", "--json")
    assert status == 1 and "gone.mid: broken-link" in err
    same = json.loads(out)
    assert same["path"] == f"{odd.parent}/Pr\ufffdlude.mid.gz"
    assert same["mean_nll"] == pytest.approx(midi["mean_nll"], rel=1e-5)  # other shapes, other sums
    status, _, err = run(capsys, "score", tmp_path / "not.mid", "--checkpoint", folder / "lm")
    assert status == 2 and "none of the 1 files" in err


def test_score_leaves_out_what_is_not_there_or_makes_no_sense(folder, capsys, tmp_path):
    for name, text in (("one.json", "[6]"), ("far.json", "[6, 99999]"), ("no.json", "{")):
        (tmp_path / name).write_text(text)
    write_midi(Performance(500, np.zeros(0, NOTE)), tmp_path / "silent.mid")
    (tmp_path / "empty").mkdir()
    bad = ["gone.mid", "one.json", "far.json", "no.json", "silent.mid", "empty"]
    status, out, err = run(
        capsys, "score", *(tmp_path / name for name in bad), folder / "piece.mid",
        "--checkpoint", folder / "lm", "--json",
    )  # fmt: skip
    assert status == 1 and len(out.splitlines()) == 1 and "6 of 7 files left out" in err
    left_out = [line for line in err.splitlines() if line.startswith("left out: ")]
    for name in bad:
        (line,) = [line for line in left_out if line.startswith(f"left out: {tmp_path / name}: ")]
        assert line.count(str(tmp_path / name)) == 1
    assert any("gone.mid: no such file" in line for line in left_out)
    status, _, err = run(capsys, "score", tmp_path / "gone.mid", "--checkpoint", folder / "lm")
    assert status == 2 and "gone.mid: no such file" in err


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to read JavaScript")
def test_scripts_of_the_pages_are_javascript(tmp_path):
    from aria_jax.report import listening, piano_roll

    for text in (piano_roll.PLAYER_SCRIPT, listening._VOTING.replace("STUDY", "{}")):
        (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        (tmp_path / "script.js").write_text(script)
        checked = subprocess.run(
            ["node", "--check", str(tmp_path / "script.js")], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr
