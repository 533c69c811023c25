"""Every command that docs/pod.md and the README's section on pods show can be given."""

import re
import shlex
from pathlib import Path

import pytest

from aria_jax.aot import accelerator_run
from aria_jax.config import with_overrides
from aria_jax.presets import for_task
from launch import cluster, local

ROOT = Path(__file__).parents[2]


def commands():
    readme = (ROOT / "README.md").read_text().partition("## From laptop to pod")[2]
    text = (ROOT / "docs" / "pod.md").read_text() + readme.partition("\n## ")[0]
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition("|")[0], comments=True)
            if words and words[0] in ("aria-jax", "python"):
                yield words


def check(words):
    """Words after `aria-jax` name a task or a program, a preset, and settings that exist."""
    verb, *rest = words
    if "--status" in rest:
        assert verb == "train" and len(rest) == 2
        return
    if "--profile-next" in rest:
        assert verb == "train" and len(rest) == 3 and rest[1].isdigit()
        return
    settings = [word for word in rest if "=" in word]
    preset = rest[rest.index("--preset") + 1]
    if verb == "compile":
        run = accelerator_run(preset, "pretrain", rest[rest.index("--topology") + 1])
    else:
        assert verb == "train"
        run = for_task(preset, rest[0])
    assert not with_overrides(run, settings).problems()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_of_the_docs(words, capsys):
    if words[0] == "aria-jax":
        check(words[1:])
        return
    module, arguments = words[2], words[3:]
    split = arguments.index("--")
    check(arguments[split + 1 :])
    # An option of the launcher: what it takes, and the processes, instead of starting them.
    dry = [*arguments[:split], "--dry-run", *arguments[split:]]
    assert {"launch.cluster": cluster, "launch.local": local}[module].main(dry) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index("") + 1 :] if "" in lines else lines
    assert lines and all("aria-jax train pretrain" in line for line in lines)


def test_the_docs_show_all_three_sizes():
    shown = [" ".join(words) for words in commands()]
    for part in (
        "launch.local -n 2",
        "launch.cluster slurm",
        "launch.cluster tpu-pod",
        "launch.cluster gke",
        "--dry-run --on v5p:64",
        "compile --preset medium",
    ):
        assert any(part in line for line in shown), part
