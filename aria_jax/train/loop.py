"""The one training loop, for every task."""

import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aria_jax.checkpoints import DIRECTORY
from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.checkpoints.models import model_record
from aria_jax.checkpoints.sending import Sender
from aria_jax.config import RunConfig, to_dict, with_overrides
from aria_jax.presets import chip_of
from aria_jax.sharding import batch_sharding, iterate_rows, make_mesh
from aria_jax.train.goodput import FILE, GoodputRecorder, ProfileRequests
from aria_jax.train.hooks import (
    Clock,
    Evaluate,
    Hook,
    KeepBest,
    Profile,
    SaveCheckpoints,
    StepMonitor,
)
from aria_jax.train.init import InitFrom, check_allow_change, corpus_record, resolve_init
from aria_jax.train.plan import Plan, tokens_per_step, train_flops_per_token
from aria_jax.train.processes import Watchdog, lost_contact, stop_requests
from aria_jax.train.state import Network, first_state, random_state, shardings_of
from aria_jax.train.step import TrainState, TrainStep, make_eval_step, make_train_step
from aria_jax.train.tasks import Task, build_task, resolve
from aria_jax.train.trackers import Log, MetricSink
from data_pipeline import storage
from data_pipeline.artifact import refuse_inside, refuse_occupied
from data_pipeline.errors import UserError
from data_pipeline.loaders import BatchStream
from data_pipeline.loaders.mixture import Data, common_manifest, sources_of
from data_pipeline.shards import reading_of

TIMED_FLOPS = 1e12
"""Of a step that is timed whole; ten seconds or so of two cores."""


@dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        final_step: optimiser steps done.
        metrics: the last of each metric, "train/loss", "val/loss", …
        interrupted: a signal or `should_stop` ended it before `config.train.steps`.
        init: how it began.
    """

    final_step: int
    metrics: dict[str, float]
    interrupted: bool
    init: InitFrom


def run(
    config: RunConfig,
    data: Data,
    workdir: str | Path,
    *,
    init_from: str | Path | None = None,
    sinks: Sequence[MetricSink] = (),
    on_start: Callable[[InitFrom], None] | None = None,
    should_stop: Callable[[int], bool] | None = None,
    allow_change: Collection[str] = (),
    clock: Clock = time.perf_counter,
) -> TrainResult:
    """Trains, or goes on training, in `workdir`.

    SIGTERM and SIGINT end the run after the step under way, with a checkpoint. Stopped and run
    again, a run computes bit for bit what it would have computed without the stop (one process).
    The weights of the lowest validation loss are kept in `workdir/best`, a trace of
    `config.train.profile_steps`, or of steps that are asked for meanwhile, in `workdir/profile`.
    A process without a step for `config.train.stall_minutes` says where it is.

    Args:
        data: folder of token shards, or several with their weights ("FOLDER:0.7"), whose rows
            the batches mix.
        init_from: checkpoint or published .safetensors whose weights a new run starts from.
        on_start: told how the run begins, before the first step.
        should_stop: asked after each step; True ends the run as a signal does.
        allow_change: "data" and "dtype" may differ from those of the run that is resumed.
        clock: by which throughput is measured and `config.train.checkpoint_every_minutes` pass.

    Raises:
        UserError: contradictory settings, unusable data or checkpoint, a diverged loss; the run in
            `workdir` has another corpus, other settings or another beginning.
    """
    check_allow_change(allow_change)
    workdir, sources = storage.local(workdir), sources_of(data)
    for source in sources:
        refuse_inside(workdir, source.path, "a corpus")
    refuse_occupied(workdir, "a training run")
    config = resolve(config.validate(), sources, workdir)
    mesh, settings = make_mesh(config.mesh), config.train
    check_batch(config, mesh.shape)
    task = build_task(config, sources, mesh=mesh)
    for note in (*task.notes, *replicated_work(config, mesh)):
        warnings.warn(note, stacklevel=2)
    manifest = common_manifest(sources)
    tokenizer, reading = manifest["tokenizer"]["preset"], reading_of(manifest)
    record = {**model_record(config.model, tokenizer, reading), "config": to_dict(config)}
    record["corpus"] = corpus_record(sources)
    with (
        closing(Watchdog(workdir, settings.stall_minutes)) as watchdog,
        _checkpoints(workdir, settings.keep_checkpoints) as checkpointer,
        _sent(workdir) as send,
    ):
        init = resolve_init(workdir, init_from, checkpointer)
        network, state, step = first_state(config, mesh, init, checkpointer, record, allow_change)
        if on_start is not None:
            on_start(init)
        log = Log(sinks if jax.process_index() == 0 else ())
        sharding = batch_sharding(mesh)
        goodput = _goodput(config, workdir, step)
        monitor = _monitor(config, task, mesh, log, checkpointer, clock)
        monitor.pausing = goodput.spent_on
        save = _save(config, task, checkpointer, record, send, clock)
        save.saving = goodput.spent_on
        best = KeepBest(workdir, record, checkpointer.wait)
        evaluate = _evaluate(config, task, network, sharding, log, monitor, best)
        with _profile(config, workdir, step) as profile:
            state, step, interrupted = _train(
                make_train_step(config, network.build, task.loss, shardings_of(state)),
                iterate_rows(task.train, sharding, step),
                (state, step),
                goodput=goodput,
                last_step=settings.steps,
                hooks=(watchdog, monitor, profile, evaluate, save),
                mesh=mesh,
                should_stop=should_stop,
            )
        save.save(step, state)
        checkpointer.wait()
        goodput.end()
    return TrainResult(step, log.last, interrupted, init)


def _train(
    train_step: TrainStep,
    batches: Iterator[dict[str, jax.Array]],
    begin: tuple[TrainState, int],
    *,
    goodput: GoodputRecorder,
    last_step: int,
    hooks: Sequence[Hook],
    mesh: jax.sharding.Mesh,
    should_stop: Callable[[int], bool] | None,
) -> tuple[TrainState, int, bool]:
    """Advances to the last step, or until asked to stop; (state, step, whether it was asked)."""
    (state, step), stopped = begin, False
    with stop_requests() as stop_requested, jax.set_mesh(mesh):
        while step < last_step and not stopped:
            number = jax.device_put(np.int32(step))
            with goodput.spent_on("data_s"):
                batch = next(batches)
            with goodput.dispatching():
                state, metrics = train_step(state, batch, number)
            step += 1
            for hook in hooks:
                hook.on_step(step, state, metrics)
            goodput.on_step(step)
            wanted = should_stop is not None and should_stop(step)
            stopped = stop_requested(step) or wanted
        for hook in hooks:
            hook.finish()
    return state, step, stopped and step < last_step


def time_step(config: RunConfig, corpus: Data) -> tuple[float, int]:
    """What a step takes on the devices here: (seconds, rows that were timed); writes nothing.

    Random weights, real rows. The first step compiles and is not counted. Where a whole batch
    would take long, a small one is timed and counted by its rows.

    Args:
        config: resolved against the data.
    """
    data, mesh = config.data, make_mesh(config.mesh)
    check_batch(config, mesh.shape)
    timed = config
    if tokens_per_step(config) * train_flops_per_token(config) > TIMED_FLOPS:
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = min(data.global_batch, 2 * ways * config.contrastive.composer_group)
        settings = [f"data.global_batch={rows}", "train.grad_accumulation=1"]
        timed = with_overrides(config, settings)
    task = build_task(timed, corpus, mesh=mesh)
    network, state = random_state(timed, mesh)
    train_step = make_train_step(timed, network.build, task.loss, shardings_of(state))
    batches = iterate_rows(task.train, batch_sharding(mesh), 0)
    seconds = 0.0
    with jax.set_mesh(mesh):
        for number in range(2):
            began = time.perf_counter()
            state, metrics = train_step(state, next(batches), jax.device_put(np.int32(number)))
            jax.block_until_ready((state, metrics))
            seconds = time.perf_counter() - began
    return seconds * data.global_batch / timed.data.global_batch, timed.data.global_batch


def timed_plan(config: RunConfig, corpus: Data, made: Plan) -> tuple[Plan, str]:
    """The plan with the time that a step takes here; and what that is based on, or why not."""
    needed = sum(made.memory.values()) * math.prod(made.mesh.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        return made, f"this machine's {memory / 2**30:.0f} GiB do not hold a step (see --on)"
    seconds, rows = time_step(config, corpus)
    made = replace(made, step_seconds=seconds, hours=seconds * config.train.steps / 3600)
    part = "" if rows == config.data.global_batch else f" on {rows} of its rows"
    return made, f"at {seconds:.3g} s a step, measured here just now{part}"


def position(config: RunConfig, stream: BatchStream, step: int) -> dict[str, int]:
    """Where in its data a run stands after `step` steps."""
    rows = step * config.data.global_batch
    return {"seed": config.train.seed, "epoch": rows // stream.n_examples, "step": step}


def check_batch(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raises `UserError` unless every device gets as many rows as every other.

    Args:
        sizes: of the mesh, devices per axis.
    """
    ways = sizes["data"] * sizes["fsdp"]
    rows = config.data.global_batch // config.train.grad_accumulation
    if rows % ways:
        raise UserError(
            f"data.global_batch={config.data.global_batch} in {config.train.grad_accumulation} "
            f"parts of {rows} rows does not divide over {ways} devices (mesh.data × mesh.fsdp); "
            f"choose a multiple of {ways * config.train.grad_accumulation}"
        )


def replicated_work(config: RunConfig, mesh: jax.sharding.Mesh) -> list[str]:
    """What devices of an axis all compute alike because it does not divide among them."""
    divided = {"tensor": "model.n_heads", "sequence": "data.seq_len"}
    sizes = {"tensor": config.model.n_heads, "sequence": config.data.seq_len}
    return [
        f"{divided[axis]}={size} does not divide over mesh.{axis}={mesh.shape[axis]}: what could "
        "be shared is computed on every device of the axis"
        for axis, size in sizes.items()
        if size % mesh.shape[axis]
    ]


@contextmanager
def _checkpoints(workdir: Path, keep: int) -> Iterator[Checkpointer]:
    """Closed at the end, unless that would wait for a process that is gone."""
    checkpointer = Checkpointer(workdir, keep)
    try:
        yield checkpointer
    except BaseException as error:
        if lost_contact(error) is None:
            checkpointer.close()
        raise
    checkpointer.close()


def _goodput(config: RunConfig, workdir: Path, step: int) -> GoodputRecorder:
    workdir.mkdir(parents=True, exist_ok=True)
    return GoodputRecorder(
        None if jax.process_index() else workdir / FILE,
        step,
        every=config.train.log_every,
        hosts=jax.process_count(),
        devices=jax.device_count(),
    )


def _monitor(
    config: RunConfig,
    task: Task,
    mesh: jax.sharding.Mesh,
    log: Log,
    checkpointer: Checkpointer,
    clock: Clock,
) -> StepMonitor:
    def last_good() -> str:
        checkpointer.wait()
        if not (steps := checkpointer.steps()):
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {checkpointer.directory / str(steps[-1])}"

    chip = chip_of(jax.devices()[0].device_kind)
    return StepMonitor(
        log,
        log_every=config.train.log_every,
        max_bad=config.train.max_bad_steps,
        last_good=last_good,
        flops_per_token=train_flops_per_token(config),
        peak_flops=chip.flops * mesh.size if chip is not None else None,
        sources=[source.name for source in task.sources] if len(task.sources) > 1 else (),
        clock=clock,
    )


def send_workdir(workdir: Path) -> None:
    """Sends to its bucket what a run has written beside its checkpoints."""
    storage.upload(workdir, only=_beside_checkpoints)


def _beside_checkpoints(name: str) -> bool:
    return DIRECTORY not in name.split("/")


@contextmanager
def _sent(workdir: Path) -> Iterator[Callable[[], None]]:
    """Sends that all the while; yields what sends it at once, so that no step that a checkpoint
    has behind it lacks its metrics.
    """
    if jax.process_index() or not storage.is_remote(workdir):
        yield lambda: None
        return
    sender = Sender(workdir, _beside_checkpoints)
    try:
        yield sender.send_now
    finally:
        sender.stop()


def _save(
    config: RunConfig,
    task: Task,
    checkpointer: Checkpointer,
    record: dict[str, Any],
    send: Callable[[], None],
    clock: Clock,
) -> SaveCheckpoints:
    return SaveCheckpoints(
        checkpointer,
        lambda step: {**record, "position": position(config, task.train, step)},
        every=config.train.checkpoint_every,
        every_minutes=config.train.checkpoint_every_minutes,
        before=send,
        ask_every=1 if jax.process_count() == 1 else config.train.log_every,
        clock=clock,
    )


def _evaluate(
    config: RunConfig,
    task: Task,
    network: Network,
    sharding: jax.sharding.NamedSharding,
    log: Log,
    monitor: StepMonitor,
    best: KeepBest,
) -> Evaluate:
    return Evaluate(
        task,
        make_eval_step(network.build, task.loss, task.predictions),
        sharding,
        log,
        monitor,
        best,
        every=config.train.eval_every,
        last_step=config.train.steps,
        n_batches=config.train.eval_batches,
    )


@contextmanager
def _profile(config: RunConfig, workdir: Path, step: int) -> Iterator[Profile]:
    """The hook that traces the steps that were named, or are asked for while the run goes on."""
    index, several = jax.process_index(), jax.process_count() > 1
    with closing(ProfileRequests(workdir, look=index == 0)) as requests:
        profile = Profile(
            # Processes of one host would write files of the same name.
            workdir / "profile" / (f"process-{index}" if several else ""),
            config.train.profile_range,
            step,
            asked=requests.take,
            ask_every=config.train.log_every if several else 1,
        )
        with closing(profile):
            yield profile
