"""Tasks: what is evaluated, on what, and when it cannot be."""

import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from aria_jax.checkpoints.models import load_model
from aria_jax.config import SLICE_NOTES
from aria_jax.train.loop import run
from aria_jax.train.objectives import file_metrics
from aria_jax.train.tasks import build_task
from data_pipeline.loaders.slice_batches import labelled_slices
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance, write_corpus


def test_files_are_judged_by_the_token_weighted_mean_of_their_slices(
    config, corpus, tmp_path, recorder
):
    """Against the trained network run on each slice by itself; all files, however few batches."""
    settings = config("classify", "global_batch=2", "eval_batches=1", "peak_lr=0.01")
    seen = recorder()
    result = run(settings, corpus, tmp_path, sinks=[seen])
    loaded = load_model(tmp_path)
    slices = labelled_slices(
        corpus, split="val", label="composer", class_names=loaded.config.class_names,
        seq_len=settings.data.seq_len, global_batch=1, seed=0, shuffle=False, epochs=1,
        slice_notes=SLICE_NOTES,
    )  # fmt: skip
    pooled = nnx.jit(lambda model, tokens, eos: model.pooled(tokens, eos))
    total, truth = {}, {}
    for batch in slices:
        logits = np.asarray(pooled(loaded.model, batch["tokens"], batch["eos"]))[0]
        piece, n_tokens = int(batch["piece"][0]), int(batch["n_tokens"][0])
        total[piece] = total.get(piece, 0) + n_tokens * softmax(logits)
        truth[piece] = int(batch["label"][0])
    assert len(slices) > len(total) == 5, "some file must have several slices"
    right = np.mean([np.argmax(total[piece]) == truth[piece] for piece in truth])
    assert result.metrics["val/n_files"] == 5
    assert result.metrics["val/file_accuracy"] == pytest.approx(right)
    assert 0 <= result.metrics["val/file_macro_f1"] <= 1


def test_a_long_slice_decides_against_two_short_ones():
    likely = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]], np.float32)
    batches = [
        {
            "probabilities": likely[rows],
            "piece": np.array([4, 4, 4, -1])[rows],
            "label": np.array([0, 0, 0, 0])[rows],
            "n_tokens": np.array([1000, 10, 10, 0])[rows],
        }
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert file_metrics(batches) == {"file_accuracy": 1.0, "file_macro_f1": 1.0, "n_files": 1.0}


def small_corpus(folder, val_labels):
    """Four training pieces, and a validation piece for each of the labels."""
    folder.mkdir(exist_ok=True)
    rng, tokenizer = np.random.default_rng(0), Tokenizer.preset("aria")

    def piece(labels):
        return tokenizer.encode(random_performance(rng, 60), labels=labels), labels

    train = [piece({"composer": name, "composition": name}) for name in "abab"]
    write_corpus(folder, "train", train, n_shards=1)
    if val_labels is not None:
        write_corpus(folder, "val", [piece(labels) for labels in val_labels], n_shards=1)
    return folder


WORK, OTHER = {"composition": "w", "composer": "a"}, {"composition": "x", "composer": "b"}


@pytest.mark.parametrize(
    "task, val, settings, reason",
    [
        ("pretrain", None, (), "no split 'val'"),
        ("pretrain", [], (), "split 'val' is empty"),
        ("contrastive", [WORK], (), "the validation split is one piece"),
        ("contrastive", [WORK, WORK], (), "2 pieces of one composition"),
        ("contrastive", [WORK, WORK], ("mask_composition=false",), None),
        ("contrastive", [WORK, OTHER], (), None),
        ("contrastive", [{}, {}], (), None),
        (
            "classify",
            [{"composer": "c"}],
            ("model.class_names=a,b",),
            "no piece of split 'val' has",
        ),
        ("classify", [WORK], ("model.class_names=a,b",), None),
    ],
)
def test_validation_that_cannot_be_is_left_out_with_a_note(
    task, val, settings, reason, config, tmp_path
):
    made = build_task(config(task, *settings), small_corpus(tmp_path, val))
    assert (not made.evaluate) == (reason is not None)
    if reason is None:
        assert made.notes == ()
    else:
        (note,) = made.notes
        assert "no validation" in note and reason in note


def test_without_validation_pieces_a_run_trains_and_says_so(config, tmp_path, recorder):
    seen = recorder()
    corpus = small_corpus(tmp_path / "corpus", [])
    with pytest.warns(UserWarning, match="no validation: .* split 'val' is empty"):
        run(config("pretrain", "steps=1"), corpus, tmp_path / "run", sinks=[seen])
    assert seen.losses().keys() == {1} and not seen.losses("val")
    assert not (tmp_path / "run" / "best").exists()
