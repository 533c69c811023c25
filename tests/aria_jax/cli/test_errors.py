"""Every verb's help and its errors, as a user sees them: one line, exit code 2, no traceback."""

import ast
import errno
import json
import os
import subprocess
import sys

import pytest

from aria_jax.cli.main import VERBS, _keep_compiled, main


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_and_imports_no_jax(verb):
    code = (
        "import sys\nfrom aria_jax.cli.main import main\n"
        f"try: main([{verb!r}, '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, "importing jax makes --help slow"
    assert f"usage: aria-jax {verb}" in result.stdout
    assert "example" in result.stdout


def test_every_verb_is_listed_and_the_front_page_imports_nothing_heavy():
    code = (
        "import sys; from aria_jax.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(f"  {verb} " in result.stdout for verb in VERBS)
    loaded = set(ast.literal_eval(result.stderr.splitlines()[-1]))
    assert "aria_jax.cli.main" in loaded
    assert not loaded & {"jax", "jaxlib", "numpy", "grain", "numba", "flax", "scipy", "pyarrow"}


@pytest.fixture
def files(tmp_path, corpus):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mid").write_text("this is no MIDI file")
    (tmp_path / "bad.json").write_text('{"ids": "none"}')
    (tmp_path / "some.mid").write_bytes(b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xe0")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["tokenizer"]["hash"] = "0" * 64
    for file in corpus.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    return {"tmp": str(tmp_path), "corpus": str(corpus)}


CASES = {
    "unknown verb": (["trian"], "did you mean 'train'?"),
    "missing MIDI file": (["tokenize", "{tmp}/none.mid"], "no such file"),
    "not a MIDI file": (["tokenize", "{tmp}/text.mid"], "not a MIDI file"),
    "truncated MIDI file": (["tokenize", "{tmp}/some.mid"], "track 1 of 1 is missing"),
    "unknown preset": (["tokenize", "{tmp}/text.mid", "--preset", "x"], "no tokenizer preset"),
    "bad ids": (["detokenize", "{tmp}/bad.json", "{tmp}/o.mid"], "expected token ids as JSON"),
    "missing ids": (["detokenize", "{tmp}/none.json", "{tmp}/o.mid"], "no such file"),
    "missing folder": (["data", "build", "{tmp}/none", "{tmp}/out"], "no such folder"),
    "empty folder": (["data", "build", "{tmp}/empty", "{tmp}/out"], "no MIDI files"),
    "unknown filters": (
        ["data", "build", "{tmp}/empty", "{tmp}/out", "--filters", "x"], "no filter preset"),
    "bad fraction": (
        ["data", "build", "{tmp}/empty", "{tmp}/out", "--val-fraction", "2"], "must be at least 0"),
    "inspect nothing": (["data", "inspect", "{tmp}/empty"], "no token shards here"),
    "train on nothing": (
        ["train", "pretrain", "--data", "{tmp}/empty", "--workdir", "{tmp}/w"],
        "no token shards here"),
    "train on another tokenizer's shards": (
        ["train", "pretrain", "--data", "{tmp}/wrong", "--workdir", "{tmp}/w"], "tokenizer"),
    "unknown setting": (
        ["train", "pretrain", "--data", "{corpus}", "--workdir", "{tmp}/w", "stesp=3"],
        "nearest: steps"),
    "all problems at once": (
        ["train", "pretrain", "--data", "{corpus}", "--workdir", "{tmp}/w", "seq_len=99999",
         "temperature=0"], "exceeds model.max_seq_len=2048; train.temperature=0.0"),
    "not a checkpoint": (
        ["train", "pretrain", "--data", "{corpus}", "--workdir", "{tmp}/w", "--init-from",
         "{tmp}/empty", "steps=0"], "neither a checkpoint nor"),
    "embed without checkpoint": (
        ["embed", "{corpus}", "{tmp}/e.parquet", "--checkpoint", "{tmp}/empty"],
        "no checkpoint here"),
    "embed nothing": (
        ["embed", "{tmp}/empty", "{tmp}/e.parquet", "--baseline", "pitch-class"], "no MIDI files"),
    "probe nothing": (["probe", "{tmp}/none.parquet", "--label", "composer"], "no such file"),
    "probe something else": (["probe", "{tmp}/bad.json", "--label", "composer"], "not a Parquet"),
    "generate without checkpoint": (
        ["generate", "--checkpoint", "{tmp}/empty", "--out", "{tmp}/g"], "no checkpoint here"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(name, files, capsys):
    arguments, message = CASES[name]
    status = main([argument.format(**files) for argument in arguments])
    shown = capsys.readouterr().err
    line = next(line for line in shown.splitlines() if line.startswith("aria-jax: error: "))
    assert status == 2 and message in line
    assert "Traceback" not in shown


def test_an_option_is_not_near_another_for_its_dashes(capsys):
    assert main(["tokenize", "x.mid", "--out", "y"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main(["tokenize", "x.mid", "--JSON"]) == 2
    assert "did you mean '--json'?" in capsys.readouterr().err


def test_no_memory_and_a_folder_without_permission_are_one_line(tmp_path, monkeypatch, capsys):
    (file := tmp_path / "ids.json").write_text("[6, 0, 694, 17227, 16741]")
    command = ["detokenize", str(file), str(tmp_path / "new" / "out.mid")]
    for error in (
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 46094549536 bytes."),
    ):

        def failing(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("data_pipeline.midi.write_midi", failing)
            assert main(command) == 2
        shown = capsys.readouterr().err.splitlines()
        assert "the memory does not suffice" in shown[-1] and "ask for less" in shown[-1]
    assert "(42.9 GiB more were wanted)" in shown[-1] and not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert main(command) == 2 and not (tmp_path / "new").exists()
    assert "chmod u+w" in capsys.readouterr().err


@pytest.mark.parametrize("code", ["EACCES", "EROFS", "ENOSPC", "ENAMETOOLONG", "ELOOP", "EIO"])
def test_whatever_the_disk_says_is_one_line(code, tmp_path, monkeypatch, capsys):
    (file := tmp_path / "a.mid").write_bytes(b"MThd")

    def failing(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(file))

    monkeypatch.setattr("pathlib.Path.read_bytes", failing)
    assert main(["score", str(file), "--checkpoint", str(tmp_path)]) == 2
    assert main(["tokenize", str(file)]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("aria-jax: error: ") and str(file) in shown[-1], shown


def test_what_was_compiled_is_kept_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ARIA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    _keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "cache/compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    _keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_a_home_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("ARIA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    _keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
