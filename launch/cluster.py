"""Writes what a cluster needs to run one `aria-jax` command, from the templates beside this file.

    python -m launch.cluster slurm --nodes 4 --gpus 8 -- train pretrain … | sbatch
    python -m launch.cluster gke --accelerator v5p-128 --image IMAGE -- train … | kubectl apply -f -
    python -m launch.cluster tpu-pod --accelerator v5p-128 --zone us-east5-a -- train … | bash

It only writes: nothing is started. What the machines install is the wheel that `make wheel` builds
of this checkout, with the packages that the command needs; scripts carry it along, an image is
built with it (launch/Dockerfile). Nothing is mounted: data and workdir lie in a bucket, or with
SLURM on a disk that all nodes see. `--dry-run` says instead what the run takes (chips, hosts, hours
by plan), and lists every process with its environment and command.
"""

import argparse
import json
import re
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from aria_jax.presets import CHIPS
from aria_jax.train.processes import AUTO, COORDINATOR, COUNT, INDEX
from data_pipeline import storage
from data_pipeline.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
WHEELS = Path(__file__).parents[1] / "dist"
PINS = Path(__file__).parents[1] / "constraints.txt"


if TYPE_CHECKING:
    from aria_jax.config import RunConfig


class _Template(string.Template):
    delimiter = "@"  # `$` means something in shell scripts
    flags = re.VERBOSE
    pattern = r"@(?:(?P<escaped>@)|\{(?P<braced>[a-z_]+)\}|(?P<named>(?!))|(?P<invalid>(?!)))"  # type: ignore[assignment]


@dataclass(frozen=True)
class Process:
    """One process of a run: the host it is on, its own environment variables, its command."""

    host: str
    environment: dict[str, str]
    command: str

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.environment.items())
        return f"{self.host}: {settings} {self.command}"


@dataclass(frozen=True)
class Hardware:
    """What a run is given.

    Attributes:
        chip: a name of `aria_jax.presets.CHIPS`; None where nobody said.
        chips, hosts: in all.
    """

    chip: str | None
    chips: int
    hosts: int


@dataclass(frozen=True)
class TpuSlice:
    """A slice by its Cloud TPU name, e.g. v5p-128 (cores), v5litepod-64 or v6e-64 (chips)."""

    family: str
    chips: int
    runtime: str
    gke_accelerator: str

    @property
    def chips_per_host(self) -> int:
        """4, except where one host has the whole slice."""
        single_host = self.family != "v5p" and self.chips <= 8
        return self.chips if single_host else min(4, self.chips)

    @property
    def hosts(self) -> int:
        """Hosts of one slice: as many processes."""
        return self.chips // self.chips_per_host

    def times(self, slices: int) -> Hardware:
        """So many of them."""
        return Hardware(self.family, self.chips * slices, self.hosts * slices)

    @property
    def topology(self) -> str:
        """Chips along each axis of the torus, as GKE wants it: as near to a cube as possible."""
        sides = [1, 1, 1] if self.family == "v5p" else [1, 1]
        left = self.chips
        while left > 1:
            factor = next((n for n in range(2, left + 1) if left % n == 0), left)
            sides.sort()
            sides[0] *= factor
            left //= factor
        return "x".join(map(str, sorted(sides, key=lambda side: (side == 1, side))))


def tpu_slice(accelerator: str) -> TpuSlice:
    """Parses a Cloud TPU accelerator type.

    Raises:
        UserError: an unknown family, or a size that is no whole number of hosts.
    """
    family, _, size = accelerator.partition("-")
    known = {
        "v5p": ("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
        "v5litepod": ("v5e", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
        "v6e": ("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    }
    if family not in known or not size.isdigit():
        raise UserError(
            f"accelerator {accelerator!r}: expected e.g. v5p-128, v5litepod-64 or v6e-64"
        )
    name, cores, runtime, gke = known[family]
    chips = int(size) // cores
    made = TpuSlice(name, chips, runtime, gke)
    if chips < 1 or int(size) % cores or chips % made.chips_per_host:
        raise UserError(f"accelerator {accelerator!r}: no such slice")
    return made


def checkout_wheel(given: str | None) -> Path:
    """The wheel to install: the one given, or the newest that `make wheel` has built.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        found = Path(given)
        if found.suffix != ".whl" or not found.is_file():
            raise UserError(f"--wheel {given}: no such wheel; `make wheel` builds one in dist/")
        return found.absolute()
    wheels = sorted(WHEELS.glob("aria_jax-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise UserError("no wheel of this checkout: run `make wheel`, or name one with --wheel")
    return wheels[-1]


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["aria-jax", *arguments])


def option(arguments: Sequence[str], name: str) -> list[str]:
    """The values of an option among the arguments of a command."""
    behind = pairwise(arguments)
    joined = [word.partition("=")[2] for word in arguments if word.startswith(f"{name}=")]
    return [value for word, value in behind if word == name] + joined


def check_places(arguments: Sequence[str]) -> None:
    """Raises `UserError` for data or a workdir that only one machine would see."""
    for name in ("--data", "--workdir"):
        for value in option(arguments, name):
            if not storage.is_url(value):
                raise UserError(
                    f"{name} {value}: these machines share no disk, and lose their own; name a "
                    "place in a bucket, gs://BUCKET/PATH"
                )
            storage.place(value.rpartition(":")[0] if value.count(":") > 1 else value)


def extras(arguments: Sequence[str], *always: str) -> str:
    """Extras of the wheel that a command needs, for pip."""
    schemes = {"gs://": "gcs", "s3://": "s3", "hf://": "hub"}
    found = [extra for scheme, extra in schemes.items() if any(scheme in w for w in arguments)]
    for word in arguments:
        name, _, value = word.partition("=")
        if name in ("trackers", "train.trackers"):
            found += [each for each in ("wandb", "mlflow") if each in value.split(",")]
    return ",".join([*always, *found])


def tpu_pod(args: argparse.Namespace) -> tuple[str, list[Process], Hardware]:
    """Bash script with gcloud, and its processes: one per host."""
    check_places(args.arguments)
    made, command = tpu_slice(args.accelerator), _command(args.arguments)
    wheel = checkout_wheel(args.wheel)
    several = args.slices > 1
    names = [f"{args.name}-{i}" for i in range(args.slices)] if several else [args.name]
    nodes = f"--node-prefix {shlex.quote(args.name)} --node-count {args.slices}"
    script = _filled(
        "tpu_pod.sh",
        name=args.name,
        zone=args.zone,
        accelerator=args.accelerator,
        runtime=made.runtime,
        nodes=nodes if several else f"--node-id {shlex.quote(args.name)}",
        node_names=" ".join(map(shlex.quote, names)),
        spot="--spot" if args.spot else "",
        attempts=args.attempts,
        wheel=_inside_quotes(str(wheel)),
        wheel_name=_inside_quotes(wheel.name),
        extras=extras(args.arguments, "tpu"),
        pins=_inside_quotes(str(PINS)) if PINS.is_file() else "",
        constraint=f"-c {PINS.name}" if PINS.is_file() else "",
        environment=f"{COORDINATOR}={AUTO}",
        command=_inside_quotes(command),
    )
    hosts = [f"{name} worker {i}" for name in names for i in range(made.hosts)]
    processes = [Process(host, {COORDINATOR: AUTO}, command) for host in hosts]
    return script, processes, made.times(args.slices)


def gke(args: argparse.Namespace) -> tuple[str, list[Process], Hardware]:
    """JobSet manifest, and its processes: one per Pod."""
    check_places(args.arguments)
    made, command = tpu_slice(args.accelerator), _command(args.arguments)
    environment = {COORDINATOR: AUTO}
    manifest = _filled(
        "gke_jobset.yaml",
        name=args.name,
        image=args.image,
        slices=args.slices,
        hosts=made.hosts,
        chips_per_host=made.chips_per_host,
        gke_accelerator=made.gke_accelerator,
        topology=made.topology,
        attempts=args.attempts,
        command_json=json.dumps(f"exec {command}"),
        environment_json=json.dumps([{"name": n, "value": v} for n, v in environment.items()]),
    )
    pods = [f"{args.name}-slice-{s}-{h}" for s in range(args.slices) for h in range(made.hosts)]
    processes = [Process(pod, environment, command) for pod in pods]
    return manifest, processes, made.times(args.slices)


def slurm(args: argparse.Namespace) -> tuple[str, list[Process], Hardware]:
    """Batch script, and its processes: one per GPU."""
    command = _command(args.arguments)
    script = _filled(
        "slurm.sbatch",
        name=args.name,
        nodes=args.nodes,
        gpus=args.gpus,
        cpus=args.cpus,
        time=args.time,
        wheel=_inside_quotes(str(checkout_wheel(args.wheel))),
        extras=extras(args.arguments, "gpu"),
        extra="\n".join(f"#SBATCH {option}" for option in args.sbatch),
        command=_inside_quotes(command),
    )
    count = args.nodes * args.gpus
    processes = [
        Process(
            f"node {index // args.gpus} GPU {index % args.gpus}",
            {COORDINATOR: "FIRST_NODE:PORT", COUNT: str(count), INDEX: str(index)},
            command,
        )
        for index in range(count)
    ]
    return script, processes, Hardware(args.chip, count, args.nodes)


def costs(hardware: Hardware, arguments: Sequence[str]) -> list[str]:
    """What a command takes of that hardware, as far as the price depends on it: a line each.

    Hours are those of `aria-jax train … --dry-run`: by formula, of a share of the peak FLOP/s.

    Raises:
        UserError: settings that cannot work.
    """
    kind, n = hardware.chip or "GPUs", hardware.chips
    lines = [f"chips    {n} {kind} on {hardware.hosts} hosts"]
    if arguments[0] != "train":
        return [*lines, "hours    unknown: only training is planned"]
    if hardware.chip is None:
        return [*lines, "hours    unknown: name the GPUs with --chip h100 (or another)"]
    from aria_jax.train.loop import check_batch
    from aria_jax.train.plan import plan

    config = _as_planned(hardware, arguments)
    if isinstance(config, str):
        return [*lines, f"hours    unknown: {config}"]
    made = plan(config, n_examples=1, n_devices=n, chip=CHIPS[hardware.chip])
    check_batch(config, made.mesh)
    hours, steps = made.hours or 0.0, config.train.steps
    lines.append(
        f"hours    {hours:,.1f} by plan, {hours * n:,.0f} chip-hours: {steps:,} steps of "
        f"{made.tokens_per_step:,} tokens at {made.assumed_mfu:.0%} MFU (assumed)"
    )
    needed = sum(made.memory.values()) / 2**30
    fits = "fits" if made.fits else "DOES NOT FIT"
    lines.append(f"memory   {needed:.1f} GiB per chip of {(made.hbm or 0) / 2**30:.0f}: {fits}")
    minutes = config.train.checkpoint_every_minutes or float("inf")
    return [*lines, f"lost     at most {minutes:g} minutes of steps at a preemption, and the start"]


def _as_planned(hardware: Hardware, arguments: Sequence[str]) -> "RunConfig | str":
    """The run as it is computed there; or why its steps are not known here."""
    from aria_jax.config import CORPUS, with_overrides
    from aria_jax.presets import TOKENS_AT_ONCE, for_hardware, for_task, with_config_file
    from aria_jax.train.tasks import resolve

    config = for_task((option(arguments, "--preset") or ["tiny"])[-1], arguments[1])  # type: ignore[arg-type]
    if hardware.chip in TOKENS_AT_ONCE:
        per_host = hardware.chips // hardware.hosts
        config = for_hardware(config, hardware.chip, hardware.chips, per_host=per_host)
    for file in option(arguments, "--config"):
        config = with_config_file(config, file)
    settings = [word for word in arguments if "=" in word and not word.startswith("-")]
    taken = {value for name in ("--data", "--workdir") for value in option(arguments, name)}
    config = with_overrides(config, [word for word in settings if word not in taken]).validate()
    if config.train.epochs is not None:
        try:
            return resolve(config, option(arguments, "--data"), accelerator=True)
        except UserError as error:
            return f"epochs={config.train.epochs:g} of data that cannot be read here ({error})"
    if config.model.vocabulary == CORPUS:  # fewer than all, which the data would say
        return replace(config, model=replace(config.model, vocabulary=()))
    return config


def _inside_quotes(text: str) -> str:
    """`text` for a place between single quotes of a shell script."""
    return text.replace("'", "'\\''")


def _filled(template: str, **values: object) -> str:
    return _Template((TEMPLATES / template).read_text()).substitute(
        {name: str(value) for name, value in values.items()}
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, make in (("tpu-pod", tpu_pod), ("gke", gke), ("slurm", slurm)):
        kind = kinds.add_parser(
            name,
            help=(make.__doc__ or "").splitlines()[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        kind.set_defaults(make=make)
        kind.add_argument("--name", default="aria-jax", help="of the job")
        kind.add_argument("--dry-run", action="store_true", help="what it takes; the processes")
        if name != "gke":
            kind.add_argument(
                "--wheel", metavar="FILE", help="what to install (default: newest of dist/)"
            )
        kind.add_argument("arguments", nargs="+", help="after `--`: what follows `aria-jax`")
        if name == "slurm":
            kind.add_argument("--nodes", type=int, default=1)
            kind.add_argument("--gpus", type=int, default=8, help="per node")
            kind.add_argument("--cpus", type=int, default=8, help="per GPU")
            kind.add_argument("--time", default="24:00:00")
            gpus = [name for name, chip in CHIPS.items() if chip.platform != "tpu"]
            kind.add_argument("--chip", choices=gpus, help="which GPU, to plan the hours")
            kind.add_argument(
                "--sbatch", action="append", default=[], metavar="OPTION",
                help="another sbatch option, e.g. --sbatch=--partition=a100",
            )  # fmt: skip
            continue
        kind.add_argument("--accelerator", default="v5p-128", help="v5p-N, v5litepod-N or v6e-N")
        kind.add_argument("--slices", type=int, default=1)
        kind.add_argument("--attempts", type=int, default=20, help="starts after preemptions")
        if name == "gke":
            kind.add_argument(
                "--image", required=True, help="container built with launch/Dockerfile"
            )
        else:
            kind.add_argument("--zone", required=True)
            kind.add_argument("--spot", action="store_true", help="cheaper, may be taken back")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the filled template; or what the run takes, and its processes."""
    args = _parser().parse_args(argv)
    try:
        text, processes, hardware = args.make(args)
        if args.dry_run:
            text = "\n".join([*costs(hardware, args.arguments), "", *map(str, processes), ""])
    except UserError as error:
        print(f"launch.cluster: error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
