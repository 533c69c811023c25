"""Training on a mixture: losses told apart, resumed alike, another mixture refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.cli.main import main
from aria_jax.losses import Groups
from aria_jax.losses.contrastive import contrastive_loss
from aria_jax.losses.cross_entropy import classification_loss, next_token_loss
from aria_jax.train.loop import run
from aria_jax.train.tasks import build_task
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance, write_corpus

GROUPS = Groups(jnp.array([0, 1, 1, 0, 2, 1]), 4)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    rng, tokenizer = np.random.default_rng(1), Tokenizer.preset("aria")
    for split, count in (("train", 9), ("val", 3)):
        pieces = []
        for i in range(count):
            labels = {"composer": ("liszt", "ravel")[i % 2], "composition": f"work {40 + i}"}
            ids = tokenizer.encode(random_performance(rng, 80), labels=labels)
            pieces.append((ids, labels))
        write_corpus(folder, split, pieces)
    return folder


@pytest.fixture
def mixture(corpus, second):
    return [f"{corpus}:0.75", f"{second}:0.25"]


def test_losses_of_groups_are_those_of_their_rows():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (6, 5, 8))
    head = jax.random.normal(keys[1], (8, 11))
    targets = jax.random.randint(keys[2], (6, 5), 0, 11)
    mask = jnp.arange(5)[None] < jnp.array([5, 4, 3, 2, 0, 1])[:, None]

    def loss(hidden, head, groups):
        return next_token_loss(hidden, head, targets, mask, z_loss=1e-3, groups=groups)

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=())
    (plain, _), wanted = grad(hidden, head, None)
    (value, aux), found = jax.value_and_grad(lambda *a: loss(*a, GROUPS), (0, 1), has_aux=True)(
        hidden, head
    )
    assert float(value) == pytest.approx(float(plain), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted)
    assert aux["by_group"]["weight"].tolist() == [7, 8, 0, 0]
    for group, rows in enumerate(([0, 3], [1, 2, 5])):
        rows = np.array(rows)
        own, _ = next_token_loss(hidden[rows], head, targets[rows], mask[rows], z_loss=1e-3)
        share = aux["by_group"]["loss"][group] / aux["by_group"]["weight"][group]
        assert float(share) == pytest.approx(float(own), rel=1e-5)

    logits = hidden[:, 0]
    value, aux = classification_loss(logits, targets[:, 0] % 8, mask[:, 0], GROUPS)
    assert float(aux["by_group"]["loss"].sum() / 5) == pytest.approx(float(value), rel=1e-6)
    assert aux["by_group"]["weight"].tolist() == [2, 3, 0, 0]

    ids = jnp.array([0, 1, 2, 3, -1, 4])
    value, aux = contrastive_loss(hidden[:, 0], hidden[:, 1], composition=ids, groups=GROUPS)
    assert float(aux["by_group"]["loss"].sum() / 5) == pytest.approx(float(value), rel=1e-6)
    assert aux["by_group"]["weight"].tolist() == [2, 3, 0, 0], "padding counts nowhere"


@pytest.mark.parametrize(
    "task, settings",
    [
        ("pretrain", ()),
        ("contrastive", ("grad_accumulation=2",)),
        ("classify", ()),
        pytest.param("pretrain", ("grad_accumulation=2",), marks=pytest.mark.slow),
        pytest.param("contrastive", (), marks=pytest.mark.slow),
        pytest.param("classify", ("grad_accumulation=2",), marks=pytest.mark.slow),
    ],
)
def test_losses_and_tokens_of_each_corpus_are_logged(
    config, mixture, corpus, second, recorder, tmp_path, task, settings
):
    log = recorder()
    run(config(task, "steps=2", "eval_every=2", *settings), mixture, tmp_path / "run", sinks=[log])
    (_, _, first), (_, _, _), (_, _, val) = log.rows
    a, b = corpus.name, second.name
    assert first[f"n_tokens/{a}"] + first[f"n_tokens/{b}"] == pytest.approx(first["n_tokens"])
    assert first[f"n_tokens/{a}"] > first[f"n_tokens/{b}"] > 0
    low, high = sorted([first[f"loss/{a}"], first[f"loss/{b}"]])
    assert low <= first["loss"] <= high and low < high
    assert val["loss"] == pytest.approx(0.75 * val[f"loss/{a}"] + 0.25 * val[f"loss/{b}"])


@pytest.mark.slow
def test_validation_of_each_corpus_is_that_of_a_run_on_it(
    config, mixture, corpus, second, recorder, tmp_path
):
    def val(data, name):
        log = recorder()
        run(config("pretrain", "steps=0", "eval_every=1"), data, tmp_path / name, sinks=[log])
        run(config("pretrain", "steps=1", "eval_every=1", "peak_lr=1e-30"), data,
            tmp_path / f"{name}1", sinks=[log])  # fmt: skip
        return next(metrics for _, split, metrics in log.rows if split == "val")

    both, first, other = val(mixture, "both"), val(corpus, "first"), val([str(second)], "other")
    assert both[f"loss/{corpus.name}"] == pytest.approx(first["loss"], rel=1e-6)
    assert both[f"loss/{second.name}"] == pytest.approx(other["loss"], rel=1e-6)


def test_stopped_and_resumed_equals_straight(config, mixture, recorder, tmp_path):
    straight, parts = recorder(), recorder()
    settings = config("pretrain", "steps=4")
    run(settings, mixture, tmp_path / "straight", sinks=[straight])
    run(settings, mixture, tmp_path / "parts", sinks=[parts], should_stop=lambda step: step == 2)
    run(settings, mixture, tmp_path / "parts", sinks=[parts])
    assert parts.losses() == straight.losses()


def test_another_mixture_is_refused_unless_allowed(config, mixture, corpus, second, tmp_path):
    settings = config("pretrain", "steps=1")
    run(settings, mixture, tmp_path / "run")
    other = [f"{corpus}:0.5", f"{second}:0.5"]
    for data in (other, corpus):
        with pytest.raises(UserError, match=r"corpus: was .*:0.75.* is .*--allow-change data"):
            run(config("pretrain", "steps=2"), data, tmp_path / "run")
    with pytest.warns(UserWarning, match="going on although it changed"):
        run(config("pretrain", "steps=2"), other, tmp_path / "run", allow_change=["data"])


def test_classes_vocabulary_and_notes_are_of_all_corpora(config, mixture, corpus, second):
    from aria_jax.train.tasks import resolve

    found = resolve(config("classify"), mixture)
    assert found.model.class_names == ("bach", "chopin", "liszt", "ravel")
    assert found.data.sources == tuple(mixture) and resolve(config(), corpus).data.sources == ()
    closed = resolve(config("pretrain", "model.vocabulary=corpus"), mixture).model
    assert (
        closed.n_rows >= resolve(config("pretrain", "model.vocabulary=corpus"), corpus).model.n_rows
    )
    notes = build_task(config("pretrain", "steps=4"), mixture).notes
    assert len(notes) == 1 and f"{corpus.name} 0.75 of the rows" in notes[0]


def test_the_command_line_takes_several_and_a_file_of_settings(
    mixture, corpus, second, tmp_path, capsys
):
    small = ("d_model=16", "n_heads=2", "n_layers=1", "seq_len=32", "global_batch=4", "steps=1",
             "eval_batches=1", "log_every=1")  # fmt: skip
    first, other = (word for data in mixture for word in [("--data", data)])
    run_dir = str(tmp_path / "run")
    assert main(["train", "pretrain", *first, *other, "--workdir", run_dir, "--json", *small]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert {f"train/loss/{corpus.name}", f"val/loss/{second.name}"} <= metrics.keys()
    again = ["--config", f"{run_dir}/config.yaml"]
    assert main(["train", "pretrain", *again, "--workdir", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["train/loss"] == metrics["train/loss"]
    assert main(["train", "pretrain", "--workdir", run_dir]) == 2
    assert "--data FOLDER" in capsys.readouterr().err
