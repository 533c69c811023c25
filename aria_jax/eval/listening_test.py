"""Pairwise listening tests: who hears what on which side, and what the votes say.

The paper's protocol: 15 s prompts with 45 s continuations, ours against another system's, blinded;
two-sided sign test without ties. Both sides of a pair begin with the same prompt, which is checked.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.midi import Performance

ONSET_TOLERANCE_MS = 50
"""How far apart the onsets of one note may lie in two clips: systems round them."""
CHECKED_SHARE = 0.9
"""Of the prompt's length that is compared: its last notes may be followed early."""
MIN_SAME_SHARE = 0.95
"""Of the notes in it that either clip must share with the other."""
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


def same_prompt(one: Performance, other: Performance, seconds: float) -> bool:
    """Whether two clips begin with the same notes, seconds counted from the first note of each.

    Of the notes that begin in the first 90 % of `seconds`, at least 95 % of either clip have a
    partner of the same pitch in the other whose onset is at most 50 ms away.
    """
    end_ms = seconds * 1000 * CHECKED_SHARE
    sides = [_by_pitch(performance, end_ms + ONSET_TOLERANCE_MS) for performance in (one, other)]
    for mine, theirs in (sides, sides[::-1]):
        n = n_same = 0
        for pitch, onsets_ms in mine.items():
            free = list(theirs.get(pitch, ()))
            for onset_ms in (onset for onset in onsets_ms if onset < end_ms):
                n += 1
                near = [other for other in free if abs(other - onset_ms) <= ONSET_TOLERANCE_MS]
                if near:
                    n_same += 1
                    free.remove(near[0])
        if n == 0 or n_same < MIN_SAME_SHARE * n:
            return False
    return True


def _by_pitch(performance: Performance, end_ms: float) -> dict[int, list[float]]:
    """Onsets before `end_ms`, in ms from the first note, of each pitch; ascending."""
    notes = performance.notes
    onsets_ms = performance.ms(notes["start"])
    if len(onsets_ms):
        onsets_ms = onsets_ms - onsets_ms.min()
    found: dict[int, list[float]] = {}
    for pitch, onset_ms in sorted(zip(notes["pitch"].tolist(), onsets_ms.tolist(), strict=True)):
        if onset_ms < end_ms:
            found.setdefault(pitch, []).append(onset_ms)
    return found


def fit_of_participants(one: "Comparison", n_participants: int, asked_each: int = 1) -> str | None:
    """What to say where a row does not sum to the judgements that so many people make.

    Raises:
        UserError: there are more judgements than that.
    """
    total, expected = one.wins + one.ties + one.losses, n_participants * asked_each
    if total > expected:
        raise UserError(
            f"{one.opponent}: {total} judgements of {n_participants} participants, who make "
            f"{expected}: some count more than once, and the sign test takes judgements as "
            "independent; count each person once, or say how many each made"
        )
    if total < expected:
        return (
            f"{one.opponent}: {total} of the {expected} judgements that {n_participants} "
            f"participants make; {expected - total} are missing, and the test knows nothing of why"
        )
    return None


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
            prompt = _least_used([p for p in prompts if p not in heard], used[opponent], rng)
            side = _least_used([True, False], ours_first[opponent], rng)
            heard.add(prompt)
            used[opponent][prompt] += 1
            ours_first[opponent][side] += 1
            trials.append(Trial(f"t{ids[len(trials)]:04d}", judge, opponent, prompt, side))
    return trials


def _least_used(options: Sequence, counts: Counter, rng: np.random.Generator):
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
