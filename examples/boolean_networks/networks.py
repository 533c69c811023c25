"""Boolean networks, as published or at random, and their asynchronous simulation in NumPy.

A network is a truth table for each gene. In a simulation every gene is updated at random times, at
rate 1; besides, it flips by itself at rate `noise` (Gillespie's algorithm; Stoll, Viara, Barillot,
Calzone, "Continuous time Boolean modeling for biological signaling", BMC Systems Biology 2012). A
knock-out holds a gene at 0, an over-expression at 1.
"""

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MYELOID = {
    "GATA2": "GATA2 and not (GATA1 and FOG1) and not PU1",
    "GATA1": "(GATA1 or GATA2 or Fli1) and not PU1",
    "FOG1": "GATA1",
    "EKLF": "GATA1 and not Fli1",
    "Fli1": "GATA1 and not EKLF",
    "SCL": "GATA1 and not PU1",
    "CEBPa": "CEBPa and not (GATA1 and FOG1 and SCL)",
    "PU1": "(CEBPa or PU1) and not (GATA1 or GATA2)",
    "cJun": "PU1 and not Gfi1",
    "EgrNab": "(PU1 and cJun) and not Gfi1",
    "Gfi1": "CEBPa and not EgrNab",
}
"""Differentiation of blood cells: Krumsiek, Marr, Schroeder, Theis, "Hierarchical Differentiation
of Myeloid Progenitors Is Encoded in the Transcription Factor Network", PLoS ONE 2011."""

CELL_TYPES = {
    "erythrocyte": {"GATA1", "FOG1", "EKLF", "SCL"},
    "megakaryocyte": {"GATA1", "FOG1", "Fli1", "SCL"},
    "monocyte": {"CEBPa", "PU1", "cJun", "EgrNab"},
    "granulocyte": {"CEBPa", "PU1", "Gfi1"},
}
"""The attractors of `MYELOID` that the paper finds, by the genes that are on."""
PROGENITOR = {"GATA2", "CEBPa", "PU1"}
"""Where differentiation begins in the paper."""

CELL_CYCLE = {
    "CycD": "CycD",
    "Rb": "(not CycD and not CycE and not CycA and not CycB) or (p27 and not CycD and not CycB)",
    "E2F": "(not Rb and not CycA and not CycB) or (p27 and not Rb and not CycB)",
    "CycE": "E2F and not Rb",
    "CycA": "(E2F or CycA) and not Rb and not Cdc20 and not (Cdh1 and UbcH10)",
    "p27": "not CycD and not CycB and ((not CycE and not CycA) or (p27 and not (CycE and CycA)))",
    "Cdc20": "CycB",
    "Cdh1": "(not CycA and not CycB) or Cdc20 or (p27 and not CycB)",
    "UbcH10": "not Cdh1 or (Cdh1 and UbcH10 and (Cdc20 or CycA or CycB))",
    "CycB": "not Cdc20 and not Cdh1",
}
"""The mammalian cell cycle: Fauré, Naldi, Chaouiya, Thieffry, "Dynamical analysis of a generic
Boolean model for the control of the mammalian cell cycle", Bioinformatics 2006."""

HELPER = {
    "GATA3": "(GATA3 or STAT6) and not Tbet",
    "IFNg": "(IRAK or NFAT or STAT4 or Tbet) and not STAT3",
    "IFNgR": "IFNg",
    "IL10": "GATA3",
    "IL10R": "IL10",
    "IL4": "GATA3 and not STAT1",
    "IL4R": "IL4 and not SOCS1",
    "IRAK": "False",
    "JAK1": "IFNgR and not SOCS1",
    "NFAT": "False",
    "SOCS1": "STAT1 or Tbet",
    "STAT1": "JAK1",
    "STAT3": "IL10R",
    "STAT4": "False",
    "STAT6": "IL4R",
    "Tbet": "(STAT1 or Tbet) and not GATA3",
}
"""T helper cells without signals from outside: Mendoza & Xenarios, "A method for the generation of
standardized qualitative dynamical systems of regulatory networks", Theoretical Biology and Medical
Modelling 2006, in Boolean form."""


@dataclass(frozen=True)
class Network:
    """Rules as truth tables.

    Attributes:
        genes: names [G].
        regulators: numbers of each gene's regulators, int64 [G, K]; 0 behind the last of fewer.
        tables: what becomes of each gene by the number that its regulators' values make, the first
            of them being the lowest bit; bool [G, 2^K].
    """

    genes: tuple[str, ...]
    regulators: np.ndarray
    tables: np.ndarray

    @staticmethod
    def of_rules(rules: Mapping[str, str]) -> "Network":
        """Of expressions in Python's `and`, `or`, `not` over the genes."""
        genes = tuple(rules)
        parsed = {gene: ast.parse(rule, mode="eval") for gene, rule in rules.items()}
        named = {
            gene: sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}, key=genes.index)
            for gene, tree in parsed.items()
        }
        width = max(map(len, named.values()))
        regulators = np.zeros((len(genes), width), np.int64)
        tables = np.zeros((len(genes), 2**width), bool)
        for i, gene in enumerate(genes):
            names = named[gene]
            regulators[i, : len(names)] = [genes.index(name) for name in names]
            for number in range(2**width):
                values = {name: bool(number >> k & 1) for k, name in enumerate(names)}
                tables[i, number] = _value(parsed[gene].body, values)
        return Network(genes, regulators, tables)

    def targets(self, states: np.ndarray) -> np.ndarray:
        """What each gene's rule makes of states, bool [..., G] both."""
        bits = 1 << np.arange(self.regulators.shape[1])
        number = (states[..., self.regulators] * bits).sum(axis=-1)
        return self.tables[np.arange(len(self.genes)), number]

    @cached_property
    def all_states(self) -> np.ndarray:
        """bool [2^G, G], of small networks."""
        return np.array(list(itertools.product([False, True], repeat=len(self.genes))))

    def fixed_points(self) -> list[frozenset[str]]:
        """The genes that are on in each state that no update leaves."""
        states = self.all_states
        stays = (self.targets(states) == states).all(axis=1)
        return [self.named(state) for state in states[stays]]

    def named(self, state: np.ndarray) -> frozenset[str]:
        """The genes that are on, state bool [G]."""
        return frozenset(np.array(self.genes)[state].tolist())

    def state(self, on: Sequence[str] | set[str] | frozenset[str]) -> np.ndarray:
        """Inverse of `named`."""
        return np.isin(self.genes, sorted(on))


def _value(node: ast.expr, values: Mapping[str, bool]) -> bool:
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_value(part, values) for part in node.values)
        case ast.BoolOp(op=ast.Or()):
            return any(_value(part, values) for part in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, values)
        case ast.Name():
            return values[node.id]
        case ast.Constant(value=bool(value)):
            return value
    raise ValueError(f"a rule says {ast.unparse(node)}, which is no and, or, not")


# --- random networks -----------------------------------------------------------------------------


def is_canalising(table: np.ndarray) -> bool:
    """Whether one value of one regulator decides, whatever the others are; table bool [2^K]."""
    k = len(table).bit_length() - 1
    cube = table.reshape((2,) * k)
    return any(
        len(np.unique(np.take(cube, value, axis=axis))) == 1
        for axis in range(k)
        for value in (0, 1)
    )


def needs_all(table: np.ndarray) -> bool:
    """Whether each of the regulators makes a difference; table bool [2^K]."""
    k = len(table).bit_length() - 1
    cube = table.reshape((2,) * k)
    return all((np.take(cube, 0, axis=a) != np.take(cube, 1, axis=a)).any() for a in range(k))


def three_input_rules() -> dict[bool, np.ndarray]:
    """Rules of three regulators that all matter and are on in 3 or in 5 of 8 cases, so that both
    kinds are on equally often: canalising ones under True, others under False; bool [N, 8] each.
    """
    rules = np.array(list(itertools.product([False, True], repeat=8)))
    rules = rules[np.isin(rules.sum(axis=1), (3, 5))]
    rules = np.array([rule for rule in rules if needs_all(rule)])
    kind = np.array([is_canalising(rule) for rule in rules])
    return {canalising: rules[kind == canalising] for canalising in (True, False)}


def random_network(genes: Sequence[str], rules: np.ndarray, rng: np.random.Generator) -> Network:
    """Each gene has three other regulators and one of `rules` (bool [N, 8]), on as often as off."""
    n = len(genes)
    regulators = np.array(
        [rng.choice(np.delete(np.arange(n), g), 3, replace=False) for g in range(n)]
    )
    tables = rules[rng.integers(len(rules), size=n)]
    return Network(tuple(genes), regulators, tables)


# --- simulation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Simulated runs of one network.

    Attributes:
        time: of each flip, float [R, S]; infinite after the last one.
        gene: that flips, int64 [R, S].
        states: before the first flip and after each, bool [R, S + 1, G].
    """

    time: np.ndarray
    gene: np.ndarray
    states: np.ndarray

    @property
    def n_flips(self) -> np.ndarray:
        """Of each run, int64 [R]."""
        return np.isfinite(self.time).sum(axis=1)


def simulate(
    network: Network,
    start: np.ndarray,
    rng: np.random.Generator,
    *,
    duration: float = np.inf,
    noise: float = 0.0,
    held: Mapping[str, bool] | None = None,
    max_flips: int = 1000,
) -> Runs:
    """Runs from `start` (bool [R, G]), all at once, each until nothing can change or time is up.

    Args:
        noise: rate at which a gene flips against its rule or before it; 0 ends at fixed points.
        held: genes that are knocked out (False) or over-expressed (True) from the beginning.
    """
    fixed = np.array([gene in (held or {}) for gene in network.genes])
    state = start.copy()
    state[:, fixed] = [(held or {})[gene] for gene in network.genes if gene in (held or {})]
    n_runs, n_genes = state.shape
    clock = np.zeros(n_runs)
    times, genes, states = [], [], [state.copy()]
    for _ in range(max_flips):
        rate = (network.targets(state) != state) + noise
        rate = np.where(fixed, 0.0, rate)
        total = rate.sum(axis=1)
        with np.errstate(divide="ignore"):
            clock = clock + rng.exponential(size=n_runs) / total
        clock = np.where(clock <= duration, clock, np.inf)
        alive = np.isfinite(clock)
        if not alive.any():
            break
        drawn = rng.random(n_runs) * total
        gene = np.minimum((rate.cumsum(axis=1) <= drawn[:, None]).sum(axis=1), n_genes - 1)
        state = state.copy()
        state[alive, gene[alive]] ^= True
        times.append(clock)
        genes.append(gene)
        states.append(state)
    shape = (n_runs, len(times))
    return Runs(
        np.array(times).T.reshape(shape), np.array(genes, np.int64).T.reshape(shape),
        np.stack(states, axis=1),
    )  # fmt: skip
