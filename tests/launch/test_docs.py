"""Every command that docs/pod.md and the README's section on pods show can be given; those of
docs/pod.md that need nothing but this machine are run, in their order.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from aria_jax.aot import accelerator_run
from aria_jax.cli.main import VERBS, Parser, main
from aria_jax.config import full_name, with_overrides
from aria_jax.embed.table import read_embeddings
from aria_jax.presets import for_task
from data_pipeline import storage
from data_pipeline.storage import buckets
from launch import cluster, local

ROOT = Path(__file__).parents[2]
POD = (ROOT / "docs" / "pod.md").read_text()
README = (ROOT / "README.md").read_text().partition("## From laptop to pod")[2]
SMALL = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=128", "global_batch=8", "steps=4",
         "eval_every=9", "checkpoint_every=2", "emb_size=8"]  # fmt: skip


def commands(text):
    """(what a block says it needs, words) of every line of the fenced blocks."""
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        needs = lines[0] if lines[0].startswith("# needs ") else ""
        for line in lines:
            words = shlex.split(line.partition(" | ")[0], comments=True)
            if words:
                yield needs, words


SHOWN = [*commands(POD), *commands(README.partition("\n## ")[0])]


def check(words):
    """Words after `aria-jax` are arguments of a verb, a preset, and settings that exist."""
    verb = getattr(importlib.import_module(f"aria_jax.cli.{VERBS[words[0]][0]}"),
                   words[0].replace("-", "_").upper())  # fmt: skip
    verb.add_arguments(parser := Parser(prog=f"aria-jax {words[0]}"))
    args = verb.parse(parser, words[1:])
    if words[0] not in ("train", "compile") or not getattr(args, "preset", None):
        return
    if words[0] == "compile":
        run = accelerator_run(args.preset, "pretrain", args.topology)
    else:
        run = for_task(args.preset, words[1])
    assert not with_overrides(run, args.settings).problems()


@pytest.mark.parametrize("words", [words for _, words in SHOWN], ids=" ".join)
def test_commands_of_the_docs(words, capsys):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "aria-jax":
        check(words[1:])
    elif words[0] == "python":
        module, arguments = words[2], words[3:]
        split = arguments.index("--")
        check(arguments[split + 1 :])
        # An option of the launcher: what it takes, and the processes, instead of starting them.
        dry = [*arguments[:split], "--dry-run", *arguments[split:]]
        assert {"launch.cluster": cluster, "launch.local": local}[module].main(dry) == 0
        lines = capsys.readouterr().out.splitlines()
        lines = lines[lines.index("") + 1 :] if "" in lines else lines
        command = shlex.join(["aria-jax", *arguments[split + 1 :]])
        assert lines and all(command in line for line in lines)
    else:
        assert words[0] == "gcloud", "another program"


def test_what_is_not_run_says_what_it_needs():
    for needs, words in commands(POD):
        starts = "launch.cluster" in words and "--dry-run" not in words
        assert needs or not (starts or words[0] in ("gcloud", "make")), words


def test_the_docs_show_all_three_sizes():
    shown = [" ".join(words) for _, words in SHOWN]
    for part in (
        "launch.local -n 2",
        "launch.cluster slurm",
        "launch.cluster tpu-pod",
        "launch.cluster gke",
        "--dry-run --on v5p:64",
        "compile --preset medium",
    ):
        assert any(part in line for line in shown), part


def made_small(words):
    """A command with a small model, where it trains one."""
    if "train" not in words or "--status" in words or "--dry-run" in words:
        return words
    small = ["tiny" if before == "--preset" else word
             for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
    given = {full_name(word.partition("=")[0]) for word in words if re.match(r"[\w.]+=", word)}
    return small + [
        setting for setting in SMALL if full_name(setting.partition("=")[0]) not in given
    ]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_the_runbook(bucket, midi_corpus, tmp_path, monkeypatch, capsys):
    """All of it that this machine can do, with a bucket of the very name."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copytree(midi_corpus, "my_midis")
    with tarfile.open("midis.tar", "w") as archive:
        archive.add("my_midis", ".")
    buckets._client("gs://my-bucket").mkdir("my-bucket")
    buckets.put(Path("midis.tar"), "gs://my-bucket/midis.tar")
    said = {}
    for words in (words for needs, words in commands(POD) if not needs):
        line = shlex.join(words)
        if words[0] == "aria-jax":
            assert main(made_small(words)[1:]) == 0, (line, capsys.readouterr().err)
            shown = capsys.readouterr()
            said.setdefault(line, []).append(shown.out + shown.err)
        elif words[2] == "launch.cluster":
            assert cluster.main(words[3:]) == 0 and "32 chip-hours" in capsys.readouterr().out
        else:
            assert words[:3] == ["python", "-m", "launch.local"], line
            small, alone = [sys.executable, *made_small(words)[1:]], {**os.environ, "XLA_FLAGS": ""}
            done = subprocess.run(small, env=alone, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (line, done.stderr[-2000:])
    trained = [texts for line, texts in said.items() if "--workdir gs://my-bucket/run4" in line]
    assert sum(map(len, trained)) == 3 and "step 6" in trained[-1][0]
    [status] = said["aria-jax train --status gs://my-bucket/run4"]
    assert "step 4, not running" in status and "goodput" in status
    assert len(read_embeddings("gs://my-bucket/emb").path) == 10
    [found] = [texts[0] for line, texts in said.items() if line.startswith("aria-jax search")]
    assert "(the query itself)" in found and "index: exact, 10 rows" in found
    names = storage.listing(storage.place("gs://my-bucket"))
    assert {"data/manifest.json", "run4/goodput.jsonl", "emb/_metadata"} <= set(names)
