"""What a finetuned class head says of files, and how rightly so."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from aria_jax.embed.encode import Encode
from aria_jax.embed.pieces import Piece, Rejection, Source
from aria_jax.losses.cross_entropy import file_probabilities
from data_pipeline.shards import TokenShards
from data_pipeline.workers import map_in_order

FILES_AT_ONCE = 64
"""Enough slices for full length-bucketed batches."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of a file.

    Attributes:
        sha256: of the MIDI file.
        probabilities: float64 [C], mean over slices weighted by their tokens.
        labels: what is known of the file.
    """

    path: str
    sha256: str
    probabilities: np.ndarray
    labels: dict[str, str]

    @property
    def predicted(self) -> int:
        """Number of the most likely class."""
        return int(self.probabilities.argmax())


def predict(
    source: Source,
    encode: Encode,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Prediction | Rejection]:
    """A prediction for each file of `source`, in order.

    Args:
        encode: slices to probabilities, as `embed.encode.class_encoder` makes it.
        workers: processes that read and tokenise.
    """
    n = len(source.paths)
    cut = map_in_order(source.cut, range(n), workers=workers, ahead=2 * FILES_AT_ONCE)
    done = 0
    if progress is not None:
        progress(0, n)
    while files := list(islice(cut, FILES_AT_ONCE)):
        predictions = _predictions([file for file in files if isinstance(file, Piece)], encode)
        for file in files:
            yield next(predictions) if isinstance(file, Piece) else file
        done += len(files)
        if progress is not None:
            progress(done, n)


def _predictions(pieces: Sequence[Piece], encode: Encode) -> Iterator[Prediction]:
    if not pieces:
        return
    slices = [ids for piece in pieces for ids in piece.slices]
    n_tokens = np.array([len(ids) for ids in slices])
    of_piece = np.repeat(np.arange(len(pieces)), [len(piece.slices) for piece in pieces])
    _, likely_FxC = file_probabilities(encode(slices), n_tokens, of_piece)
    for piece, likely_C in zip(pieces, likely_FxC, strict=True):
        yield Prediction(piece.path, piece.sha256, likely_C, piece.labels)


@dataclass(frozen=True)
class Scores:
    """How well labels were predicted.

    Attributes:
        n_scored: files whose label is one of the classes; without any the scores are nan.
        accuracy, macro_f1: in 0..1; F1 over the classes that occur or are predicted.
        confusion: int64 [C, C], true class by row.
    """

    n_scored: int
    accuracy: float
    macro_f1: float
    confusion: np.ndarray


def score_predictions(
    predictions: Sequence[Prediction], label: str, class_names: Sequence[str]
) -> Scores:
    """Compares predictions with the `label` of the files that have one of the classes."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    number = {name: i for i, name in enumerate(class_names)}
    known = [p for p in predictions if p.labels.get(label) in number]
    if not known:
        empty = np.zeros((len(class_names), len(class_names)), int)
        return Scores(0, float("nan"), float("nan"), empty)
    y_true = [number[p.labels[label]] for p in known]
    y_pred = [p.predicted for p in known]
    return Scores(
        n_scored=len(known),
        accuracy=float(accuracy_score(y_true, y_pred)),
        macro_f1=float(f1_score(y_true, y_pred, average="macro")),
        confusion=confusion_matrix(y_true, y_pred, labels=range(len(class_names))),
    )


def training_files(corpus: str | Path) -> frozenset[str]:
    """sha256 of the MIDI files that a model learnt from: the training split of its token shards.

    Raises:
        UserError: no token shards there.
    """
    shards = TokenShards(corpus, "train")
    return frozenset(shards[i].meta["sha256"] for i in range(len(shards)))
