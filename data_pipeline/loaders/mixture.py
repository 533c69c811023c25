"""Several corpora as one stream of examples: of which corpus each is, and which of its examples.

The corpora take turns by their weights, spread as evenly as they divide (Grain's mixing), so that
where each comes from is a function of its number alone: a mixture resumes at any step, and any rows
of a batch can be had alone. A corpus whose examples are used up begins its next epoch.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.loaders import Batch, BatchStream, Examples
from data_pipeline.shards import MANIFEST, load_manifest, reading_of

_ENDLESS = 1 << 40
_WEIGHTED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Source:
    """One corpus of several.

    Attributes:
        path: folder of token shards.
        weight: how many of the rows are its own, beside the weights of the others.
        name: what metrics call it.
    """

    path: Path
    weight: float = 1.0
    name: str = ""


Data = str | Path | Sequence[str | Path | Source]
"""A folder of token shards, or several with a weight each, "FOLDER:0.7"."""


def sources_of(data: Data) -> tuple[Source, ...]:
    """What `data` names, weights as shares of one; names are those of the folders.

    Raises:
        UserError: no folder, one twice, a weight that is not above 0, weights for some only.
    """
    given = [data] if isinstance(data, str | Path) else list(data)
    if not given:
        raise UserError("name token shards: a folder, or several with a weight each, FOLDER:0.7")
    if all(isinstance(one, Source) for one in given):
        return tuple(one for one in given if isinstance(one, Source))
    parsed = [_parsed(str(one)) for one in given]
    weights = [weight for _, weight in parsed]
    if len(parsed) > 1 and None in weights and any(weight is not None for weight in weights):
        bare = next(path for path, weight in parsed if weight is None)
        raise UserError(f"--data {bare}: give every corpus a weight ({bare}:0.5), or none of them")
    for path, weight in parsed:
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise UserError(f"--data {path}:{weight:g}: the weight must be above 0")
    paths = [storage.local(path) for path, _ in parsed]
    commonest, n_times = Counter(path.resolve() for path in paths).most_common(1)[0]
    if n_times > 1:
        raise UserError(f"--data names {commonest} more than once; give it one weight")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [storage.url(path) for path in paths]
    total = math.fsum(weight or 1.0 for weight in weights)
    return tuple(
        Source(path, (weight or 1.0) / total, name if len(paths) > 1 else "")
        for path, weight, name in zip(paths, weights, names, strict=True)
    )


def _parsed(text: str) -> tuple[str, float | None]:
    """Folder and weight; a colon with a number may belong to the name of a folder."""
    found = _WEIGHTED.fullmatch(text)
    if found is None or (Path(text) / MANIFEST).is_file():
        return text, None
    return found[1], float(found[2])


def written(sources: Sequence[Source]) -> tuple[str, ...]:
    """The sources as `sources_of` reads them."""
    if len(sources) == 1:
        return (storage.url(sources[0].path),)
    return tuple(f"{storage.url(source.path)}:{source.weight:.6g}" for source in sources)


def common_manifest(sources: Sequence[Source]) -> dict[str, Any]:
    """The manifest of the first corpus, with whose ids those of the others can be mixed.

    Raises:
        UserError: no shards, or made with another tokenizer or another reading.
    """
    manifests = [load_manifest(source.path) for source in sources]
    first = manifests[0]
    for source, manifest in zip(sources, manifests, strict=True):
        pair = None
        if manifest["tokenizer"] != first["tokenizer"]:
            pair = [f"tokenizer {m['tokenizer']['preset']}" for m in (first, manifest)]
        elif reading_of(manifest) != reading_of(first):
            pair = [f"reading {reading_of(m)}" for m in (first, manifest)]
        if pair is not None:
            raise UserError(
                f"{sources[0].path} and {source.path} cannot be mixed: {pair[0]}, and {pair[1]}; "
                "build one of them again as the other was"
            )
    return first


def mixed(streams: Sequence[BatchStream], sources: Sequence[Source]) -> BatchStream:
    """One endless stream whose rows come from all, with `source` int32 [B] beside what each gives:
    the number of the row's corpus. A single stream is returned as it is.
    """
    if len(streams) == 1:
        return streams[0]
    examples = MixedExamples([s.examples for s in streams], [source.weight for source in sources])
    return BatchStream(examples, streams[0].global_batch, None, streams[0].workers)


class MixedExamples:
    """Examples of several corpora; an epoch is as many as all have together."""

    def __init__(self, parts: Sequence[Examples], weights: Sequence[float]):
        self._parts, self._weights = tuple(parts), tuple(weights)
        self.n_examples = sum(part.n_examples for part in parts)

    @cached_property
    def _order(self) -> Any:
        """Number of an example -> (its corpus, its number there)."""
        import grain

        def numbered(source: int) -> Any:
            return grain.MapDataset.range(_ENDLESS).map(lambda number: (source, number))

        parts = [numbered(source) for source in range(len(self._parts))]
        return grain.MapDataset.mix(parts, weights=self._weights)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def batch(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        """Rows of all corpora, in order."""
        numbers = (epochs * self.n_examples + indices).tolist()
        places = np.array([self._order[number] for number in numbers], np.int64).reshape(-1, 2)
        batch: Batch = {"source": places[:, 0].astype(np.int32)}
        for source, part in enumerate(self._parts):
            rows = np.flatnonzero(places[:, 0] == source)
            made = part.batch(*np.divmod(places[rows, 1], part.n_examples))
            for name, values in made.items():
                shape = (len(places), *values.shape[1:])
                batch.setdefault(name, np.empty(shape, values.dtype))[rows] = values
        return batch
