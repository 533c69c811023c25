"""Pairwise listening tests: who hears what on which side, and what the votes say.

The paper's protocol: 15 s prompts with 45 s continuations, ours against another system's, blinded;
two-sided sign test without ties.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError

CHOICES = ("first", "tie", "second")


@dataclass(frozen=True)
class Trial:
    """One question to one judge.

    Attributes:
        id: unique in the study; says nothing about the systems.
        judge: 0, 1, …
        opponent: the system ours is compared with.
        prompt: name of the prompt both continue.
        ours_first: whether ours is the first of the two clips.
    """

    id: str
    judge: int
    opponent: str
    prompt: str
    ours_first: bool


def design(
    opponents: Sequence[str],
    prompts: Sequence[str],
    *,
    n_judges: int,
    trials_per_judge: int,
    rng: np.random.Generator,
) -> list[Trial]:
    """A counter-balanced plan, judge by judge.

    Opponents are judged equally often, give or take one; ours stands first in half of each
    opponent's trials, give or take one; an opponent's prompts are used equally often, give or take
    one more where a judge must not hear the same prompt twice.

    Raises:
        UserError: nothing to compare, or a judge would have to hear a prompt twice.
    """
    if not opponents or not prompts or n_judges < 1 or trials_per_judge < 1:
        raise UserError("a listening test needs an opponent, a prompt, a judge and a trial")
    if trials_per_judge > len(prompts):
        raise UserError(
            f"{trials_per_judge} trials a judge with {len(prompts)} prompts would repeat a prompt: "
            "add prompts or ask less of each judge"
        )
    used = {opponent: Counter[str]() for opponent in opponents}
    ours_first = {opponent: Counter[bool]() for opponent in opponents}
    ids = rng.permutation(n_judges * trials_per_judge)
    trials: list[Trial] = []
    for judge in range(n_judges):
        turns = [
            opponents[(judge * trials_per_judge + turn) % len(opponents)]
            for turn in range(trials_per_judge)
        ]
        heard: set[str] = set()
        for opponent in rng.permutation(turns).tolist():
            prompt = _least([p for p in prompts if p not in heard], used[opponent], rng)
            side = _least([True, False], ours_first[opponent], rng)
            heard.add(prompt)
            used[opponent][prompt] += 1
            ours_first[opponent][side] += 1
            trials.append(Trial(f"t{ids[len(trials)]:04d}", judge, opponent, prompt, side))
    return trials


def _least(options: Sequence, counts: Counter, rng: np.random.Generator):
    """One of the options used least, at random."""
    least = min(counts[option] for option in options)
    rarest = [option for option in options if counts[option] == least]
    return rarest[int(rng.integers(len(rarest)))]


@dataclass(frozen=True)
class Comparison:
    """Ours against one opponent.

    Attributes:
        opponent: its name.
        wins, ties, losses: judgements, of ours.
        p_value: exact two-sided sign test, ties left out; 1.0 where all are ties.
        win_rate: share of wins among decided judgements; None where all are ties.
        low, high: exact (Clopper-Pearson) 95% interval of the win rate.
    """

    opponent: str
    wins: int
    ties: int
    losses: int
    p_value: float
    win_rate: float | None
    low: float
    high: float


def compare(
    opponent: str, wins: int, ties: int, losses: int, *, n_judgements: int | None = None
) -> Comparison:
    """Analyses counts.

    Args:
        n_judgements: how many judgements there should be; checked where given.

    Raises:
        UserError: negative counts, none at all, or a sum that is not `n_judgements`.
    """
    from scipy.stats import binomtest

    total = wins + ties + losses
    if min(wins, ties, losses) < 0 or total == 0:
        raise UserError(f"{opponent}: {wins} wins, {ties} ties, {losses} losses are no judgements")
    if n_judgements is not None and total != n_judgements:
        raise UserError(
            f"{opponent}: {wins} wins + {ties} ties + {losses} losses = {total} judgements, but "
            f"{n_judgements} were made; find the missing or doubled ones before testing"
        )
    decided = wins + losses
    if not decided:
        return Comparison(opponent, wins, ties, losses, 1.0, None, 0.0, 1.0)
    test = binomtest(wins, decided, 0.5)
    interval = test.proportion_ci(0.95, method="exact")
    return Comparison(
        opponent,
        wins,
        ties,
        losses,
        float(test.pvalue),
        wins / decided,
        float(interval.low),
        float(interval.high),
    )


def analyse(trials: Sequence[Trial], votes: Mapping[str, str]) -> list[Comparison]:
    """The comparison with every opponent, in the order of their names.

    Args:
        trials: of the judges who took part.
        votes: by trial id, one of `CHOICES`.

    Raises:
        UserError: a vote for an unknown trial, an unknown choice, or trials without a vote.
    """
    by_id = {trial.id: trial for trial in trials}
    if unknown := sorted(set(votes) - set(by_id)):
        raise UserError(f"votes for trials that these judges never had: {', '.join(unknown[:5])}")
    if wrong := sorted(set(votes.values()) - set(CHOICES)):
        raise UserError(f"a vote is one of {', '.join(CHOICES)}, not {wrong[0]!r}")
    counts = {trial.opponent: Counter[str]() for trial in trials}
    asked = Counter(trial.opponent for trial in trials)
    for trial_id, choice in votes.items():
        trial = by_id[trial_id]
        ours = "first" if trial.ours_first else "second"
        outcome = "ties" if choice == "tie" else "wins" if choice == ours else "losses"
        counts[trial.opponent][outcome] += 1
    return [
        compare(
            opponent,
            counts[opponent]["wins"],
            counts[opponent]["ties"],
            counts[opponent]["losses"],
            n_judgements=asked[opponent],
        )
        for opponent in sorted(counts)
    ]
