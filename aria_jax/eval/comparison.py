"""Music of two systems compared: by listeners, pair by pair, and by what can be counted.

The paper's listening test: 15 s prompts with 45 s continuations, ours against another system's,
blinded; two-sided sign test without ties. Both sides of a pair begin with the same prompt, which is
checked.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.midi import DRUM_CHANNEL, Performance

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
    clips = [_by_pitch(performance, end_ms + ONSET_TOLERANCE_MS) for performance in (one, other)]
    for clip, partner in (clips, clips[::-1]):
        n = n_same = 0
        for pitch, onsets_ms in clip.items():
            free = list(partner.get(pitch, ()))
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


def _least_used(options: Sequence[Any], counts: Counter[Any], rng: np.random.Generator) -> Any:
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


WINDOW_MS = 2000
"""Length of the stretches whose pitch classes are compared for self-similarity."""
CHORD_MS = 30
"""Onsets closer than this sound together: no inter-onset interval lies between them."""
PHRASE_NOTES = 4


@dataclass(frozen=True)
class MusicStatistics:
    """One performance in numbers; nan where it is too short to say.

    Attributes:
        notes_per_second: note density, from the first to the last onset.
        pitch_class_entropy: bits, 0 (one pitch class) to log2(12) = 3.58, notes weighted equally.
        onset_interval_median: seconds between successive onsets (chords count once).
        onset_interval_spread: interquartile range over median: 0 is mechanical.
        self_similarity: mean cosine of the pitch-class profiles of all pairs of 2 s windows.
        repetition: share of `PHRASE_NOTES` (4) pitches in a row that have come before.
        polyphony: mean number of notes sounding while any sounds.
        semitone_clusters: share of notes that begin with another a semitone away.
        pitch_range: semitones from lowest to highest note.
        velocity_deviation: standard deviation of MIDI velocity.
    """

    notes_per_second: float
    pitch_class_entropy: float
    onset_interval_median: float
    onset_interval_spread: float
    self_similarity: float
    repetition: float
    polyphony: float
    semitone_clusters: float
    pitch_range: float
    velocity_deviation: float


def music_statistics(performance: Performance) -> MusicStatistics:
    """Counts one performance; drums are left out.

    Raises:
        UserError: no notes.
    """
    notes = performance.notes[performance.notes["channel"] != DRUM_CHANNEL]
    if not len(notes):
        raise UserError("a performance without notes has no statistics")
    start_ms = performance.ms(notes["start"])
    order = np.argsort(start_ms, kind="stable")
    end_ms = performance.ms(notes["end"])[order]
    start_ms, pitch = start_ms[order], notes["pitch"][order].astype(int)
    seconds = (start_ms[-1] - start_ms[0]) / 1000
    intervals = np.diff(start_ms) / 1000
    intervals = intervals[intervals >= CHORD_MS / 1000]
    low, median, high = (
        np.percentile(intervals, (25, 50, 75)) if len(intervals) else (np.nan, np.nan, np.nan)
    )
    return MusicStatistics(
        notes_per_second=(len(notes) - 1) / seconds if seconds > 0 else np.nan,
        pitch_class_entropy=_entropy_bits(np.bincount(pitch % 12, minlength=12)),
        onset_interval_median=float(median),
        onset_interval_spread=float((high - low) / median),
        self_similarity=_self_similarity(start_ms - start_ms[0], pitch % 12),
        repetition=_repetition(pitch),
        polyphony=_polyphony(start_ms, end_ms),
        semitone_clusters=_semitone_clusters(start_ms, pitch),
        pitch_range=float(pitch.max() - pitch.min()),
        velocity_deviation=float(notes["velocity"].astype(float).std()),
    )


def _entropy_bits(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0.0


def _self_similarity(start_ms: np.ndarray, pitch_class: np.ndarray) -> float:
    window = start_ms // WINDOW_MS
    profiles = np.zeros((window[-1] + 1, 12))
    np.add.at(profiles, (window, pitch_class), 1)
    profiles = profiles[profiles.any(axis=1)]
    if len(profiles) < 2:
        return float("nan")
    profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
    cosines = profiles @ profiles.T
    n = len(profiles)
    return float((cosines.sum() - n) / (n * (n - 1)))


def _repetition(pitch: np.ndarray) -> float:
    if len(pitch) <= PHRASE_NOTES:
        return float("nan")
    phrases = np.lib.stride_tricks.sliding_window_view(pitch, PHRASE_NOTES)
    return 1 - len(np.unique(phrases, axis=0)) / len(phrases)


def _polyphony(start_ms: np.ndarray, end_ms: np.ndarray) -> float:
    """Over time; `start_ms` ascending."""
    sounding_until = np.concatenate([start_ms[:1], np.maximum.accumulate(end_ms)[:-1]])
    silence = np.maximum(start_ms - sounding_until, 0).sum()
    sounding = end_ms.max() - start_ms[0] - silence
    return float((end_ms - start_ms).sum() / sounding) if sounding > 0 else float("nan")


def _semitone_clusters(start_ms: np.ndarray, pitch: np.ndarray) -> float:
    apart = start_ms[-1] + 2 * CHORD_MS  # more than lies between onsets of neighbouring pitches
    key = np.sort(pitch * apart + start_ms)
    clustered = np.zeros(len(pitch), bool)
    for other in (pitch - 1, pitch + 1):
        at = other * apart + start_ms
        low = np.searchsorted(key, at - CHORD_MS, side="right")
        clustered |= np.searchsorted(key, at + CHORD_MS) > low
    return float(clustered.mean())


def summarise(statistics: Sequence[MusicStatistics]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each statistic over a set, nan left out.

    Raises:
        UserError: an empty set.
    """
    if not statistics:
        raise UserError("no performances to summarise")
    summary = {}
    for field in fields(MusicStatistics):
        values = np.array([getattr(one, field.name) for one in statistics], float)
        values = values[~np.isnan(values)]
        summary[field.name] = (
            (float(values.mean()), float(values.std())) if len(values) else (np.nan, np.nan)
        )
    return summary


def frechet_distance(a_NxE: np.ndarray, b_MxE: np.ndarray) -> float:
    """Distance of two sets of embeddings, each seen as a normal distribution.

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)), with covariances A and B (Dowson and Landau
    1982, as in FID and FAD). It shrinks as sets grow: compare sets of like size only.

    Raises:
        UserError: fewer than two embeddings on a side, or of different width.
    """
    a, b = np.asarray(a_NxE, np.float64), np.asarray(b_MxE, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"cannot compare embeddings of shapes {a.shape} and {b.shape}")
    if min(len(a), len(b)) < 2:
        raise UserError("the Fréchet distance needs two embeddings or more on either side")
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    mean_part = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(max(mean_part + spread, 0.0))
