"""Trajectories of Boolean networks as event series with labels, and what is known of each without
a network that learns.

No initial state, and no random network, is on both sides: a state belongs to one side for good.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aria_jax.embed.table import Embeddings
from data_pipeline.artifact import atomic
from examples.boolean_networks.networks import (
    CELL_CYCLE,
    CELL_TYPES,
    HELPER,
    MYELOID,
    PROGENITOR,
    Network,
    Runs,
    random_network,
    simulate,
    three_input_rules,
)

NETWORKS = {"myeloid": MYELOID, "cell cycle": CELL_CYCLE, "helper": HELPER}
TASKS = {
    "attractor": "which attractor a run ends in, from the first half of its flips (myeloid)",
    **{name: f"which gene is held, and how ({name})" for name in NETWORKS},
    "rules": "whether a random network's rules are canalising",
}
FEATURES = {
    "trained": "contrastive embedding",
    "untrained": "the same network, untrained",
    "state": "the last state alone",
    "activity": "mean activity of each gene",
    "flips": "flips of each gene per unit of time",
}
SIDES = ("train", "test")
TEST_SHARE, NOISE = 0.3, 0.05


class Trajectories:
    """Event series, one after the other, and what is known of each without a network."""

    def __init__(self, genes: Sequence[str]):
        self._number = {gene: i for i, gene in enumerate(genes)}
        self._events: defaultdict[str, list[Any]] = defaultdict(list)
        self.names: list[str] = []
        self.labels: list[dict[str, str]] = []
        self._features: defaultdict[str, list[np.ndarray]] = defaultdict(list)

    def add(
        self, network: Network, runs: Runs, run: int, n_flips: int, duration: float,
        labels: Mapping[str, str],
    ) -> None:  # fmt: skip
        """The first `n_flips` of a run: its initial state at time 0, then each flip."""
        name = f"{len(self.names):06d}"
        times, genes = runs.time[run, :n_flips], runs.gene[run, :n_flips]
        states = runs.states[run, : n_flips + 1]
        flipped = states[np.arange(1, n_flips + 1), genes]
        names = [*network.genes, *(network.genes[gene] for gene in genes)]
        self._events["series"] += [name] * len(names)
        self._events["time"] += [*np.zeros(len(network.genes)), *times]
        self._events["channel"] += names
        self._events["value"] += [*states[0], *flipped]
        for label in ("composition", "split", *TASKS, "step"):
            self._events[label] += [labels.get(label)] * len(names)
        self.names.append(name)
        self.labels.append(dict(labels))
        until = times[-1] if not np.isfinite(duration) and n_flips else duration
        until = until if np.isfinite(until) and until > 0 else 1.0
        held = np.diff(np.append(times, until), prepend=0.0)
        counts = np.bincount(genes, minlength=len(network.genes))
        mine = [self._number[gene] for gene in network.genes]
        features = {"state": states[-1], "activity": held @ states / until, "flips": counts / until}
        for kind, values in features.items():
            row = np.zeros(len(self._number), np.float32)
            row[mine] = values
            self._features[kind].append(row)

    def write(self, folder: Path, name: str) -> Path:
        """The Parquet file of all series."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = pa.string()
        columns = {
            "time": pa.array(np.array(self._events["time"], float)),
            "value": pa.array(np.array(self._events["value"], bool)),
            **{n: pa.array(v, text) for n, v in self._events.items() if n not in ("time", "value")},
        }
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / f"{name}.parquet") as partial:
            pq.write_table(pa.table(columns), partial)
        return folder / f"{name}.parquet"

    def baseline(self, kind: str) -> Embeddings:
        """ "state", "activity" or "flips" as if it were an embedding."""
        rows = np.stack(self._features[kind])
        zeros = np.zeros(len(rows), np.int64)
        return Embeddings(
            self.names, [""] * len(rows), rows, zeros, zeros, zeros, self.labels, kind
        )


def side_of(network: str, state: np.ndarray) -> str:
    """Where runs from a state go, decided by the state alone."""
    drawn = hashlib.sha256(f"{network} {np.packbits(state).tobytes().hex()}".encode()).digest()
    return SIDES[int.from_bytes(drawn[:4], "big") < TEST_SHARE * 2**32]


def initial_states(
    name: str,
    network: Network,
    side: str,
    n: int,
    rng: np.random.Generator,
    held: Mapping[str, bool] | None = None,
) -> np.ndarray:
    """`n` states of a side, bool [n, G], with what is held; the progenitor is on neither."""
    found: list[np.ndarray] = []
    while len(found) < n:
        state = rng.random(len(network.genes)) < 0.5
        for gene, value in (held or {}).items():
            state[network.genes.index(gene)] = value
        if side_of(name, state) == side and network.named(state) != PROGENITOR:
            found.append(state)
    return np.array(found)


def known_as(name: str, state: np.ndarray, side: str) -> dict[str, str]:
    """Labels that every run has."""
    bits = "".join(map(str, state.astype(int)))
    return {"composition": f"{name} {bits}", "split": side}


def fate(network: Network, state: np.ndarray) -> str:
    """The name of an attractor of `MYELOID`."""
    on = network.named(state)
    known = {frozenset(genes): name for name, genes in CELL_TYPES.items()}
    return known.get(on, ", ".join(sorted(on)) or "all off")


def attractor_runs(out: Trajectories, n: dict[str, int], rng: np.random.Generator) -> None:
    """Undisturbed runs without noise, seen until half of their flips are done."""
    network = Network.of_rules(MYELOID)
    for side in SIDES:
        start = initial_states("myeloid", network, side, n[side], rng)
        runs = simulate(network, start, rng)
        for run, n_flips in enumerate(runs.n_flips.tolist()):
            end = runs.states[run, n_flips]
            labels = {**known_as("myeloid", start[run], side), "attractor": fate(network, end)}
            out.add(network, runs, run, n_flips // 2, np.inf, labels)


def held_runs(
    out: Trajectories, name: str, n: dict[str, int], duration: float, rng: np.random.Generator
) -> None:
    """Noisy runs, undisturbed, and with each gene held at 0 and at 1."""
    network = Network.of_rules(NETWORKS[name])
    held: list[dict[str, bool]] = [{}]
    held += [{gene: value} for gene in network.genes for value in (False, True)]
    for one in held:
        said = "".join(f"{gene} {'on' if value else 'off'}" for gene, value in one.items())
        for side in SIDES:
            start = initial_states(name, network, side, n[side], rng, one)
            runs = simulate(network, start, rng, duration=duration, noise=NOISE, held=one)
            for run, n_flips in enumerate(runs.n_flips.tolist()):
                labels = {**known_as(name, start[run], side), name: said or "undisturbed"}
                out.add(network, runs, run, n_flips, duration, labels)


def random_runs(
    out: Trajectories, networks: dict[str, int], n: int, rng: np.random.Generator
) -> None:
    """Noisy runs of random networks, `n` of each, of both kinds of rules."""
    for canalising, rules in three_input_rules().items():
        for side in SIDES:
            for _ in range(networks[side]):
                network = random_network(tuple(MYELOID), rules, rng)
                start = initial_states("random", network, side, n, rng)
                runs = simulate(network, start, rng, duration=15.0, noise=NOISE)
                for run, n_flips in enumerate(runs.n_flips.tolist()):
                    kind = "canalising" if canalising else "not canalising"
                    labels = {**known_as("random", start[run], side), "rules": kind}
                    out.add(network, runs, run, n_flips, 15.0, labels)


def all_genes() -> list[str]:
    """Of all networks; no two of them share a gene."""
    return [gene for rules in NETWORKS.values() for gene in rules]


def corpus(scale: float, seed: int) -> Trajectories:
    """All that is learnt from and judged; `scale` multiplies the number of runs."""

    def sides(train: int, test: int) -> dict[str, int]:
        return {"train": max(2, round(train * scale)), "test": max(2, round(test * scale))}

    rng = np.random.default_rng(seed)
    out = Trajectories(all_genes())
    attractor_runs(out, sides(700, 300), rng)
    for name, duration in (("myeloid", 30.0), ("cell cycle", 15.0), ("helper", 30.0)):
        held_runs(out, name, sides(20, 10), duration, rng)
    random_runs(out, sides(42, 18), 8, rng)
    return out


def descents(n: int, seed: int) -> Trajectories:
    """Runs from the progenitor to each cell type, seen after every flip: series of one run end
    later and later.
    """
    network = Network.of_rules(MYELOID)
    start = np.tile(network.state(PROGENITOR), (n, 1))
    runs = simulate(network, start, np.random.default_rng((seed, 1)))
    out = Trajectories(all_genes())
    for run, n_flips in enumerate(runs.n_flips.tolist()):
        for seen in range(n_flips + 1):
            labels = {"attractor": fate(network, runs.states[run, n_flips]), "step": str(seen)}
            out.add(network, runs, run, seen, np.inf, labels)
    return out
