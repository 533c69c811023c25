"""Labels of whole files by a model with a class head."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from aria_jax.embed.encode import Encode
from aria_jax.embed.pieces import Piece, Rejection, Source
from aria_jax.eval.classification import confusion_counts, file_probabilities
from data_pipeline.pool import map_in_order

FILES_AT_ONCE = 64
"""Enough slices for full batches of like length."""


@dataclass(frozen=True)
class Prediction:
    """An answer about a file.

    Attributes:
        probabilities: float64 [C], mean over slices weighted by their tokens.
        labels: what is known of the file.
    """

    path: str
    probabilities: np.ndarray
    labels: dict[str, str]

    @property
    def answer(self) -> int:
        """The most likely class."""
        return int(self.probabilities.argmax())


def predict(
    source: Source,
    encode: Encode,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Prediction | Rejection]:
    """An answer for each file of `source`, in order.

    Args:
        encode: slices to probabilities, as `embed.encode.class_encoder` makes it.
        workers: processes that read and tokenise.
    """
    n = len(source.paths)
    cut = map_in_order(source.cut, range(n), workers=workers, ahead=2 * FILES_AT_ONCE)
    done = 0
    while files := list(islice(cut, FILES_AT_ONCE)):
        answered = _answered([file for file in files if isinstance(file, Piece)], encode)
        for file in files:
            yield next(answered) if isinstance(file, Piece) else file
        done += len(files)
        if progress is not None:
            progress(done, n)


def _answered(pieces: Sequence[Piece], encode: Encode) -> Iterator[Prediction]:
    if not pieces:
        return
    slices = [ids for piece in pieces for ids in piece.slices]
    n_tokens = np.array([len(ids) for ids in slices])
    of_piece = np.repeat(np.arange(len(pieces)), [len(piece.slices) for piece in pieces])
    _, likely_FxC = file_probabilities(encode(slices), n_tokens, of_piece)
    for piece, likely_C in zip(pieces, likely_FxC, strict=True):
        yield Prediction(piece.path, likely_C, piece.labels)


def confusion_of(
    predictions: Sequence[Prediction], label: str, class_names: Sequence[str]
) -> np.ndarray:
    """How files whose `label` is one of the classes were answered, int64 [C, C]."""
    number = {name: i for i, name in enumerate(class_names)}
    known = [p for p in predictions if p.labels.get(label) in number]
    truth = np.array([number[p.labels[label]] for p in known], int)
    answer = np.array([p.answer for p in known], int)
    return confusion_counts(truth, answer, len(class_names))
