"""`aria-jax train`: pretrain, continue, contrastive, classify."""

import argparse
import dataclasses
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aria_jax.cli import ProgressSink, Verb, check_folder_name
from aria_jax.cli.main import bring_weights, name_without_effect, parse_with_settings

if TYPE_CHECKING:
    from aria_jax.cli.main import Parser
    from aria_jax.config import RunConfig
    from aria_jax.presets import Chip
    from aria_jax.train.init import InitFrom

DESCRIPTION = """\
Train a model on token shards (made by `aria-jax data build`).

tasks:
  pretrain     predict the next token
  continue     one epoch of the same on short pieces with a <D> token 100 tokens before their end,
               so that the model learns to finish; start it from a pretrained checkpoint
  contrastive  slices of one performance attract, slices of different ones repel (SimCLR)
  classify     learn a label, data.label=composer

A run lives in its --workdir: checkpoints, the weights of the lowest validation loss (in `best`),
metrics.jsonl, TensorBoard events. The same command run again goes on where it stopped; another
corpus, other settings or another --init-from are refused. Ctrl-C and
SIGTERM stop it after the step under way, with a checkpoint.

What contrastive compares (all are settings):
  negatives         global: all other pieces of the batch, over every device and process; local:
                    those on the same device, as the reference's released code compares
  augment           true; false as in that code, which never switches its augmentation on
  grad_accumulation=N embeds a batch in N parts and still compares all of it (gradient caching), so
                    that global_batch=4096 pairs train on a laptop
  temperature=0.1, learned_temperature=true; variant=symmetric (reference) or nt-xent (SimCLR)
  hardness=0.5      weighs negatives by how near they are; composer_group=4 puts pieces of one
                    composer into one batch; mask_composition=false lets performances of one
                    composition repel; consecutive=true takes neighbouring slices
  pooling=mean      averages all positions instead of reading at <E>

How pieces are changed at random while training (all tasks): tempo=0.2 as a share, pitch=5
semitones, velocity=1 step of 10, mixup=true shuffles a chord's notes; rubato, velocity_curve,
note_drop, sustain, and by instrument instrument_velocity and instrument_drop are off. tempo=0
velocity=0 mixup=false only transposes, which leaves touch and timing to learn from.

classify reports file_accuracy and file_macro_f1 of the validation files too: a file's class
is that of the mean of its 300-note slices' probabilities, weighted by their tokens.

Settings are given as key=value, e.g. steps=2000 peak_lr=1e-4 data.global_batch=32 dtype=bfloat16
mesh.fsdp=4, or in a YAML or JSON file of the same keys (--config), over which the command line
wins; `aria-jax train --settings` lists them all, with type, default and meaning. A run writes its
resolved settings to WORKDIR/config.yaml, for --config to read; --status WORKDIR tells how it does,
and what share of its time was productive (goodput); --profile-next 5 WORKDIR asks it for a trace of
its next steps (trackers=… names where metrics go). With several --data, rows of all are mixed by
their weights, and losses told apart. With lora_rank=8 any task trains low-rank
adapters of the weights of --init-from (`aria-jax convert merge` makes them whole).

examples:
  aria-jax train pretrain --data my_data --workdir run1 --preset small steps=5000
  aria-jax train contrastive --data my_data --workdir run2 --preset small --init-from run1
  aria-jax train continue --data my_data --workdir run5 --init-from run1 lora_rank=8
  aria-jax train classify --data my_data --workdir run3 --init-from run1/best data.label=composer
  aria-jax train pretrain --data my_data --workdir run4 --preset medium --dry-run --on v5p:64
  aria-jax train pretrain --data my_data --workdir run6 --config run1/config.yaml seed=1
  aria-jax train contrastive --settings
  aria-jax train pretrain --data giant:0.8 --data asap:0.2 --workdir run7
  aria-jax train --status run1
  aria-jax train --profile-next 5 run1

On TPUs and GPUs a run computes in bfloat16 (dtype=float32 does not), and mesh, remat and gradient
accumulation are chosen by chip and their number (docs/tpu.md, docs/gpu.md); settings of yours go
before. A run that is resumed keeps the number type it began with."""

TASKS = ("pretrain", "continue", "contrastive", "classify", "render")


def parse(parser: "Parser", argv: Sequence[str]) -> argparse.Namespace:
    """Settings may stand between the options, too; questions about a run need no task."""
    if "--settings" in argv:
        parser = type(parser)(prog=parser.prog)
        parser.add_argument("task", choices=TASKS, nargs="?")
        parser.add_argument("--settings", action="store_true", dest="list_settings")
        parser.add_argument("--preset", default="tiny")
        parser.add_argument("--json", action="store_true")
        return parser.parse_args(argv)
    options = {word.partition("=")[0] for word in argv}
    if options & {"--status", "--profile-next"}:
        parser = type(parser)(prog=parser.prog)
        if "--status" in options:
            parser.add_argument("--status", metavar="WORKDIR")
        else:
            parser.add_argument("--profile-next", metavar="N", type=int)
            parser.add_argument("workdir", metavar="WORKDIR")
        parser.add_argument("--json", action="store_true")
        return parser.parse_args(argv)
    return parse_with_settings(parser, argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax train`."""
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--data",
        action="append",
        metavar="SHARDS[:WEIGHT]",
        help="folder of token shards; given several times, a mixture: --data A:0.7 --data B:0.3",
    )
    parser.add_argument("--workdir", required=True, help="folder of the run; made if needed")
    parser.add_argument("--preset", default="tiny", help="tiny/mini/multitrack/small/medium (tiny)")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON with settings; key=value goes before"
    )
    parser.add_argument(
        "--settings",
        action="store_true",
        dest="list_settings",
        help="list every setting with type, default and meaning, and stop",
    )
    parser.add_argument(
        "--status", metavar="WORKDIR", help="say how the run there is doing, and stop"
    )
    parser.add_argument(
        "--profile-next",
        metavar="N WORKDIR",
        help="ask the run there, as it goes on, for a trace of its next N steps, and stop",
    )
    parser.add_argument("--init-from", metavar="C", help="workdir, .safetensors or hf://OWNER/NAME")
    parser.add_argument(
        "--allow-change",
        default="",
        metavar="data,dtype",
        help="go on although the corpus or the compute dtype is not what the run began with",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would take, and stop; time is by formula, on a CPU by a step "
        "that is run and timed",
    )
    parser.add_argument(
        "--on", metavar="CHIP:COUNT", help="devices to plan for, e.g. v5p:64 (default: those here)"
    )
    parser.add_argument(
        "--assumed-mfu",
        type=float,
        metavar="F",
        help="share of the chips' peak FLOP/s to plan with (default: 0.4)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to the preset")


def run(args: argparse.Namespace) -> int:
    """Runs the training; 0 when done, 130 after Ctrl-C, 1 after SIGTERM."""
    from aria_jax.presets import for_task
    from aria_jax.train.trackers import check_trackers
    from data_pipeline.errors import UserError
    from data_pipeline.loaders.mixture import common_manifest, sources_of

    if getattr(args, "status", None) is not None:
        return _status(args)
    if getattr(args, "profile_next", None) is not None:
        return _profile_next(args)
    if args.list_settings:
        return _list_settings(args)
    preset = for_task(args.preset, args.task)
    # All that can be wrong is found before the seconds that importing jax takes.
    asked = _as_asked(preset, args)
    if not (args.data or asked.data.sources):
        raise UserError("train: name the token shards with --data FOLDER (or data.sources)")
    args.data = sources_of(args.data or asked.data.sources)
    check_trackers(asked.train.trackers)
    name_without_effect(args.task, args.settings)
    common_manifest(args.data)
    check_folder_name(args.workdir)
    _check_beginning(args)
    return _dry_run(args, preset) if args.dry_run else _train(args, preset)


TRAIN = Verb(DESCRIPTION, add_arguments, run, parse=parse)


def _check_beginning(args: argparse.Namespace) -> None:
    """What the disk can tell of a wrong start."""
    from aria_jax.checkpoints import newest_record
    from aria_jax.train.init import check_allow_change, check_same_init, init_of_new_run
    from data_pipeline.artifact import refuse_inside, refuse_occupied
    from data_pipeline.errors import UserError

    check_allow_change(_allowed(args))
    if not args.dry_run and (args.on or args.assumed_mfu is not None):
        option = "--on" if args.on else "--assumed-mfu"
        raise UserError(f"{option} has no effect without --dry-run: a run takes the devices here")
    args.assumed_mfu = 0.4 if args.assumed_mfu is None else args.assumed_mfu
    if not 0 < args.assumed_mfu <= 1:
        raise UserError(f"--assumed-mfu {args.assumed_mfu:g}: a share, above 0 and at most 1")
    for source in args.data:
        refuse_inside(args.workdir, source.path, "a corpus")
    refuse_occupied(args.workdir, "a training run")
    record = newest_record(args.workdir)
    if record is None:
        bring_weights(args.init_from)
        init_of_new_run(args.init_from)
    elif args.init_from is not None:
        check_same_init(record, record["step"], args.init_from, args.workdir)


def _allowed(args: argparse.Namespace) -> list[str]:
    return [word for word in args.allow_change.split(",") if word]


def _as_asked(preset: "RunConfig", args: argparse.Namespace) -> "RunConfig":
    """The preset with the settings of --config, and over them those of the command line."""
    from aria_jax.config import with_overrides
    from aria_jax.presets import with_config_file

    config = with_config_file(preset, args.config) if args.config else preset
    return with_overrides(config, args.settings).validate()


def _status(args: argparse.Namespace) -> int:
    from aria_jax.cli.console import print_result
    from aria_jax.train.goodput import read_status, status_text

    status = read_status(Path(args.status))
    print_result(dataclasses.asdict(status), args.json, status_text(args.status, status))
    return 0


def _profile_next(args: argparse.Namespace) -> int:
    from aria_jax.cli.console import print_result
    from aria_jax.train.goodput import request_profile

    text = request_profile(Path(args.workdir), args.profile_next)
    print_result({"steps": args.profile_next, "workdir": args.workdir}, args.json, text)
    return 0


def _list_settings(args: argparse.Namespace) -> int:
    """Prints every setting; with a task also what its preset makes of it."""
    from aria_jax.cli.console import print_result
    from aria_jax.presets import for_task, listed, settings_text

    preset = for_task(args.preset, args.task) if args.task else None
    rows = listed(preset)
    print_result({"settings": rows}, args.json, settings_text(rows, f"{args.task}, {args.preset}"))
    return 0


def _on_chips(
    args: argparse.Namespace, preset: "RunConfig", chip: "Chip | None", n: int
) -> "RunConfig":
    """The run as it is best computed on so many chips, but for what the user says."""
    from aria_jax.config import with_overrides
    from aria_jax.presets import CHIPS, TOKENS_AT_ONCE, for_hardware

    family = next((name for name in TOKENS_AT_ONCE if CHIPS[name] == chip), None)
    if family is not None:
        preset = for_hardware(preset, family, n)
        # "auto" is bfloat16 there too, but for a run that began otherwise.
        preset = with_overrides(preset, ["dtype=auto"])
    return _as_asked(preset, args)


def _train(args: argparse.Namespace, preset: "RunConfig") -> int:
    from aria_jax.cli import console

    console.stage("loading jax")
    import jax

    from aria_jax.checkpoints import newest_step
    from aria_jax.presets import chip_of, write_config
    from aria_jax.train import loop
    from aria_jax.train.processes import join_processes, leaving_together
    from aria_jax.train.tasks import resolve
    from aria_jax.train.trackers import MetricSink, open_sinks

    console.stage("looking for devices")
    first = join_processes() == 0
    if jax.process_count() > 1:
        console.hush_libraries()
    chip = chip_of(jax.devices()[0].device_kind)
    config = _on_chips(args, preset, chip, jax.device_count())
    workdir = Path(args.workdir)
    made = not workdir.exists()
    warnings.showwarning = lambda message, *_: console.note(f"warning: {message}")
    sinks: list[MetricSink] = []

    def started(init: "InitFrom") -> None:
        if first:
            console.note(init.message)
            as_begun = init.kind == "resume" and config.compute.dtype == "auto"
            began = ", as the run began" if as_begun else ""
            console.note(f"computing in {resolved.compute.dtype}{began}")
            write_config(resolved, workdir)
            console.stage("compiling the training step")
        else:
            console.note(
                f"process {jax.process_index()} of {jax.process_count()} trains; "
                "process 0 shows how far it is"
            )
            console.stage("")

    console.stage("reading the data")
    resolved = resolve(config, args.data, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if first:
        steps, warmup = resolved.train.steps, config.optimizer.warmup_steps
        if warmup >= steps:
            console.note(
                f"note: a warm-up of {warmup} steps is as long as the whole run of {steps}; "
                f"the learning rate stays low (warmup_steps={max(steps // 10, 1)} would not)"
            )
        sinks = open_sinks(resolved, workdir)
    console.stage("preparing the weights")
    console.answer_interrupt("saving; Ctrl-C again to stop now")
    try:
        with leaving_together(), console.progress_bar(args.task, "step") as report:
            result = loop.run(
                config,
                args.data,
                workdir,
                init_from=args.init_from,
                allow_change=_allowed(args),
                sinks=[*sinks, ProgressSink(resolved.train.steps, report)] if first else [],
                on_start=started,
            )
    finally:
        for sink in sinks:
            sink.close()
        if first and made and not newest_step(workdir) and not _has_metrics(workdir):
            shutil.rmtree(workdir)  # it failed before the first step
        elif first:
            loop.send_workdir(workdir)
    shown = {name: round(value, 5) for name, value in result.metrics.items()}
    summary = {"step": result.final_step, "interrupted": result.interrupted, "metrics": shown}
    text = f"step {result.final_step}: " + ", ".join(
        f"{name} {shown[name]:.4g}" for name in ("train/loss", "val/loss") if name in shown
    )
    if result.interrupted:
        text += "\ninterrupted; run the same command again to go on"
    if first:
        console.print_result({**summary, "workdir": str(workdir)}, args.json, text)
    return 0 if not result.interrupted else 130 if console.interrupted() else 1


def _has_metrics(workdir: Path) -> bool:
    log = workdir / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0


def _dry_run(args: argparse.Namespace, preset: "RunConfig") -> int:
    """Prints the plan; 1 where the memory of a device does not suffice."""
    from aria_jax.cli.console import print_result, stage

    stage("loading jax")
    import jax

    from aria_jax.presets import CHIPS, chip_of
    from aria_jax.train.loop import timed_plan
    from aria_jax.train.plan import plan, plan_text
    from aria_jax.train.tasks import build_task, resolve
    from data_pipeline.errors import UserError

    if args.on:
        name, _, count = args.on.partition(":")
        if name not in CHIPS or not count.isdigit() or int(count) < 1:
            raise UserError(
                f"--on {args.on}: expected CHIP:COUNT with a chip of {', '.join(CHIPS)}"
            )
        chip: Chip | None = CHIPS[name]
        n_devices = int(count)
    else:
        chip, n_devices = chip_of(jax.devices()[0].device_kind), jax.device_count()
    config = resolve(
        _on_chips(args, preset, chip, n_devices),
        args.data,
        args.workdir,
        accelerator=chip is not None or jax.default_backend() != "cpu",
    )
    made = plan(
        config,
        n_examples=build_task(config, args.data).train.n_examples,
        n_devices=n_devices,
        chip=chip,
        assumed_mfu=args.assumed_mfu,
    )
    basis = f"at {made.assumed_mfu:.0%} MFU (assumed)"
    if chip is None:
        stage("compiling a step and timing the next")
        made, basis = timed_plan(config, args.data, made)
    result = {**dataclasses.asdict(made), "fits": made.fits, "dtype": config.compute.dtype}
    print_result(result, args.json, plan_text(config, made, basis))
    return 1 if made.fits is False else 0
