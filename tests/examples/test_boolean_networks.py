"""The simulator against what the papers found, the runs it makes, and the example as a whole."""

import numpy as np
import pytest

from examples.boolean_networks.networks import (
    CELL_CYCLE,
    CELL_TYPES,
    HELPER,
    MYELOID,
    PROGENITOR,
    Network,
    is_canalising,
    needs_all,
    random_network,
    simulate,
    three_input_rules,
)
from examples.boolean_networks.trajectories import FEATURES, TASKS, corpus

MYELOID_NETWORK = Network.of_rules(MYELOID)


def test_the_myeloid_network_ends_in_the_four_cell_types_of_the_paper():
    start = np.tile(MYELOID_NETWORK.state(PROGENITOR), (400, 1))
    runs = simulate(MYELOID_NETWORK, start, np.random.default_rng(0))
    ends = {MYELOID_NETWORK.named(state) for state in runs.states[:, -1]}
    assert ends == {frozenset(genes) for genes in CELL_TYPES.values()}
    assert ends < set(MYELOID_NETWORK.fixed_points())


def test_the_cell_cycle_rests_or_turns_in_seven_states():
    network = Network.of_rules(CELL_CYCLE)
    assert network.fixed_points() == [frozenset({"Rb", "p27", "Cdh1"})]
    seen, state = [], network.state({"CycD"})
    while network.named(state) not in seen:
        seen.append(network.named(state))
        state = network.targets(state)  # all genes at once, as in the paper's cycle
    assert len(seen) - seen.index(network.named(state)) == 7


def test_helper_cells_have_three_fates():
    network = Network.of_rules(HELPER)
    assert set(network.fixed_points()) == {
        frozenset(),
        frozenset({"IFNg", "IFNgR", "SOCS1", "Tbet"}),
        frozenset({"GATA3", "IL10", "IL10R", "IL4", "IL4R", "STAT3", "STAT6"}),
    }


def test_a_run_flips_one_gene_at_a_time_by_its_rule():
    rng = np.random.default_rng(1)
    runs = simulate(MYELOID_NETWORK, rng.random((50, 11)) < 0.5, rng)
    for run, n in enumerate(runs.n_flips):
        states, genes = runs.states[run, : n + 1], runs.gene[run, :n]
        flipped = states[1:] != states[:-1]
        assert (flipped.sum(axis=1) == 1).all() and (flipped.argmax(axis=1) == genes).all()
        wanted = MYELOID_NETWORK.targets(states[:-1])[np.arange(n), genes]
        assert (states[1:][np.arange(n), genes] == wanted).all()
        assert (np.diff(runs.time[run, :n]) > 0).all()
        assert (MYELOID_NETWORK.targets(states[-1]) == states[-1]).all()


def test_noise_flips_what_is_stable_as_often_as_it_should():
    # One gene that keeps its value: only noise moves it; the number of flips is Poisson's.
    network, rng = Network.of_rules({"A": "A"}), np.random.default_rng(0)
    runs = simulate(network, np.ones((4000, 1), bool), rng, noise=0.5, duration=20)
    # Standard errors of 4000 runs: 0.05 of the mean, 0.22 of the variance.
    assert runs.n_flips.mean() == pytest.approx(10, abs=0.2)
    assert runs.n_flips.var() == pytest.approx(10, abs=0.9)
    assert runs.time[np.isfinite(runs.time)].max() <= 20


def test_what_is_held_does_not_move():
    rng = np.random.default_rng(2)
    held = {"PU1": False, "GATA1": True}
    runs = simulate(
        MYELOID_NETWORK, rng.random((40, 11)) < 0.5, rng, noise=0.2, duration=20, held=held
    )
    at = {gene: MYELOID_NETWORK.genes.index(gene) for gene in held}
    assert not runs.states[..., at["PU1"]].any() and runs.states[..., at["GATA1"]].all()
    assert runs.n_flips.min() > 0


def test_rules_of_both_kinds_are_on_equally_often():
    kinds = three_input_rules()
    assert {kind: len(rules) for kind, rules in kinds.items()} == {True: 48, False: 64}
    for kind, rules in kinds.items():
        assert set(rules.sum(axis=1)) == {3, 5} and rules.mean() == 0.5
        assert all(is_canalising(rule) == kind and needs_all(rule) for rule in rules)
    for table, canalising in (([0, 0, 0, 1], True), ([0, 1, 1, 0], False), ([0, 1, 1, 1], True)):
        assert is_canalising(np.array(table, bool)) == canalising
    network = random_network(tuple(MYELOID), kinds[True], np.random.default_rng(0))
    assert all(gene not in row for gene, row in enumerate(network.regulators.tolist()))


def test_no_initial_state_is_on_both_sides():
    made = corpus(0.1, seed=0)
    sides: dict[str, set] = {}
    for labels in made.labels:
        sides.setdefault(labels["composition"], set()).add(labels["split"])
    assert all(len(found) == 1 for found in sides.values())
    for task in TASKS:
        classes = {
            side: {
                labels[task] for labels in made.labels if task in labels and labels["split"] == side
            }
            for side in ("train", "test")
        }
        assert classes["test"] <= classes["train"] or task == "attractor"
    for kind in ("state", "activity", "flips"):
        table = made.baseline(kind)
        assert np.isfinite(table.embedding).all() and len(table.embedding) == len(made.names)


@pytest.mark.slow
def test_the_example_measures_everything_and_writes_its_page(tmp_path):
    from examples.boolean_networks.__main__ import main

    found = main([str(tmp_path), "--steps", "4", "--scale", "0.15"])
    page = (tmp_path / "report.html").read_text()
    assert (tmp_path / "landscape.png").is_file() and "aria-jax data build" in page
    for task in TASKS:
        scores = {name: found["probes"][task][name]["accuracy"] for name in FEATURES}
        assert all(0 <= score <= 1 for score in scores.values())
        assert f"{scores['trained']:.3f}" in page
    # A fixed point is known by its last state; half-way most of the fate is decided.
    assert found["probes"]["attractor"]["state"]["accuracy"] > 0.4
