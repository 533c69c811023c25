"""A run: resumed bit for bit, sharded without a difference, stopped in every way."""

import os
import signal

import jax
import numpy as np
import pytest

from aria_jax.checkpoints.models import load_model
from aria_jax.config import MeshConfig
from aria_jax.sharding import batch_sharding, iterate_rows, make_mesh
from aria_jax.train.goodput import REQUEST, read_status
from aria_jax.train.init import InitFrom
from aria_jax.train.loop import replicated_work, run
from aria_jax.train.state import first_state, random_state, shardings_of
from aria_jax.train.step import make_train_step
from aria_jax.train.tasks import build_task
from data_pipeline.errors import UserError


@pytest.mark.optimized
def test_stopped_and_resumed_equals_straight_bit_for_bit(
    config, corpus, tmp_path, recorder, weights
):
    settings = config("pretrain", "steps=40", "checkpoint_every=15", "ema_decay=0.9")
    straight, first, second = recorder(), recorder(), recorder()
    run(settings, corpus, tmp_path / "a", sinks=[straight])
    stopped = run(
        settings, corpus, tmp_path / "b", sinks=[first], should_stop=lambda step: step == 20
    )
    assert stopped.interrupted and stopped.final_step == 20
    resumed = run(settings, corpus, tmp_path / "b", sinks=[second])
    assert resumed.init.kind == "resume" and resumed.final_step == 40
    assert straight.losses() == {**first.losses(), **second.losses()}
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "a"), weights(tmp_path / "b"))


SLOW_LAYOUTS = [(1, 2, 1, 1), (2, 1, 1, 1), (1, 1, 2, 1), (1, 2, 2, 1), (1, 2, 1, 2), (2, 2, 2, 1)]


@pytest.mark.parametrize(
    "layout, task",
    [
        ((2, 2, 2, 1), "pretrain"),
        *(
            pytest.param(sizes, task, marks=pytest.mark.slow)
            for sizes in SLOW_LAYOUTS
            for task in ("pretrain", "contrastive")
        ),
    ],
    ids=str,
)
def test_a_run_learns_the_same_on_any_layout(
    layout, task, config, corpus, tmp_path, recorder, one_device, monkeypatch
):
    single, sharded = recorder(), recorder()
    run(config(task), corpus, tmp_path / "one", sinks=[single])
    devices = one_device[: np.prod(layout)]
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: devices)
    run(config(task, mesh=MeshConfig(*layout)), corpus, tmp_path / "several", sinks=[sharded])
    for step, loss in single.losses().items():
        assert sharded.losses()[step] == pytest.approx(loss, rel=1e-4)  # order of reductions


def test_gradient_accumulation_changes_nothing(config, corpus, tmp_path, recorder, weights):
    whole, parts = recorder(), recorder()
    run(config(), corpus, tmp_path / "whole", sinks=[whole])
    run(config("pretrain", "grad_accumulation=4"), corpus, tmp_path / "parts", sinks=[parts])
    for step, loss in whole.losses().items():
        # Rows hold different numbers of targets; each part counts by its own.
        assert parts.losses()[step] == pytest.approx(loss, rel=1e-5)
    rows = {name: [m[name] for _, _, m in r.rows] for name in ("n_tokens",) for r in (whole, parts)}
    assert rows["n_tokens"] == [m["n_tokens"] for _, _, m in whole.rows]


@pytest.mark.parametrize("task", ["continue", "classify", "contrastive"])
def test_every_task_trains_and_evaluates(task, config, corpus, tmp_path, recorder):
    seen = recorder()
    run(config(task, "eval_every=2"), corpus, tmp_path, sinks=[seen])
    assert set(seen.losses("val")) == {2, 4}
    assert all(np.isfinite(loss) for loss in seen.losses().values())
    if task == "classify":
        assert load_model(tmp_path).config.class_names == ("bach", "chopin", "liszt")


def test_a_signal_stops_with_a_checkpoint(config, corpus, tmp_path):
    def preempt(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    before = signal.getsignal(signal.SIGTERM)
    result = run(config("pretrain", "steps=50"), corpus, tmp_path, should_stop=preempt)
    assert result.interrupted and result.final_step == 2
    assert load_model(tmp_path).step == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_diverged_run_stops_names_the_last_good_checkpoint_and_keeps_weights(
    config, corpus, tmp_path, weights
):
    settings = ("steps=20", "peak_lr=1e38", "warmup_steps=0", "max_bad_steps=3", "clip_norm=none")
    with pytest.raises(UserError, match="not finite for 3 steps") as error:
        run(config("pretrain", *settings, "checkpoint_every=1"), corpus, tmp_path)
    step = load_model(tmp_path).step
    assert f"last good checkpoint is {tmp_path / 'checkpoints' / str(step)}" in str(error.value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights(tmp_path)))


def test_the_best_weights_are_kept_beside_the_last(config, corpus, tmp_path, recorder):
    seen = recorder()
    settings = ("steps=12", "eval_every=2", "peak_lr=1", "warmup_steps=6", "schedule=constant")
    run(config("pretrain", *settings), corpus, tmp_path, sinks=[seen])
    losses = seen.losses("val")
    best = min(losses, key=losses.get)
    assert best < 12, "the run must get worse for this test to say anything"
    assert load_model(tmp_path / "best").step == best
    assert load_model(tmp_path).step == 12
    worse = recorder()
    run(config("pretrain", *settings, "steps=14"), corpus, tmp_path, sinks=[worse])
    assert worse.losses("val")[14] > losses[best]
    assert load_model(tmp_path / "best").step == best, "a resumed run remembers the best loss"


def test_the_moving_average_is_what_others_load(config, corpus, tmp_path, weights):
    settings = config("pretrain", "ema_decay=0.5", "peak_lr=0.01", "steps=3")
    mesh = make_mesh(settings.mesh)
    task = build_task(settings, corpus, mesh=mesh)
    network, state, _ = first_state(settings, mesh, InitFrom("scratch", None, ""), None, {})
    step = make_train_step(settings, network.build, task.loss)
    expected = jax.tree.map(np.array, state.params)
    for number, batch in zip(range(3), task.train.iterate(), strict=False):
        state, _ = step(state, batch, np.int32(number))
        expected = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * np.asarray(p), expected, state.params)
    jax.tree.map(
        lambda e, found: np.testing.assert_allclose(found, e, rtol=1e-5, atol=1e-7),
        expected, state.ema,
    )  # fmt: skip
    run(settings, corpus, tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal, weights(tmp_path), jax.tree.map(np.array, state.ema)
    )


def test_no_step_waits_for_the_host(config, corpus):
    """Between batch and metrics nothing crosses between host and device."""
    settings = config()
    mesh = make_mesh(settings.mesh)
    task = build_task(settings, corpus, mesh=mesh)
    init = InitFrom("scratch", None, "")
    network, state, _ = first_state(settings, mesh, init, None, {})
    step = make_train_step(settings, network.build, task.loss)
    batches = iterate_rows(task.train, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        for number in range(3):
            batch = next(batches)
            at = jax.device_put(np.int32(number))
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch, at)
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("task", ["pretrain", "contrastive"])
def test_the_step_is_compiled_once_and_leaves_every_array_as_it_was_sharded(
    task, config, corpus, eight_devices
):
    settings = config(task, "global_batch=8", mesh=MeshConfig(2, 2, 2))
    mesh = make_mesh(settings.mesh)
    stream = build_task(settings, corpus, mesh=mesh)
    network, state = random_state(settings, mesh)
    step = make_train_step(settings, network.build, stream.loss, shardings_of(state))
    batches = iterate_rows(stream.train, batch_sharding(mesh))
    began = jax.tree.map(lambda leaf: (leaf.sharding, leaf.aval), state)
    with jax.set_mesh(mesh):
        for number in range(2):
            state, _ = step(state, next(batches), jax.device_put(np.int32(number)))
    assert jax.tree.map(lambda leaf: (leaf.sharding, leaf.aval), state) == began
    assert step._cache_size() == 1


def test_minutes_that_pass_are_a_reason_to_save(config, corpus, tmp_path):
    now = iter(range(10**6))  # a second a look
    settings = ("steps=3", "checkpoint_every_minutes=0.01", "keep_checkpoints=9")
    run(config("pretrain", *settings), corpus, tmp_path, clock=lambda: float(next(now)))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"1", "2", "3"}


def test_batches_that_do_not_divide_are_explained(config, corpus, tmp_path, eight_devices):
    with pytest.raises(UserError, match="choose a multiple of 8"):
        run(config("pretrain", "global_batch=6", mesh=MeshConfig(8, 1, 1)), corpus, tmp_path)


def test_work_that_is_not_shared_is_named(config, eight_devices):
    mesh = make_mesh(MeshConfig(1, 1, 4, 2))
    notes = replicated_work(config("pretrain", "seq_len=63"), mesh)
    assert [note.partition(" ")[0] for note in notes] == ["model.n_heads=2", "data.seq_len=63"]
    assert replicated_work(config("pretrain", "n_heads=4"), mesh) == []


def test_a_run_answers_what_it_is_asked_and_says_where_it_stalls(config, corpus, tmp_path):
    """A trace of steps that were asked for; compiling is longer than a step may take here."""
    (tmp_path / REQUEST).write_text("2\n")
    # A decay that no other run has: none has compiled this step.
    settings = config("pretrain", "steps=3", "stall_minutes=0.002", "weight_decay=0.07")
    with pytest.warns(UserWarning, match=r"process 0 of 1 on .* stalls before its first"):
        run(settings, corpus, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb")) and not (tmp_path / REQUEST).exists()
    assert read_status(tmp_path).stalls == []  # it went on, and to its end
