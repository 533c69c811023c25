"""Schemes that turn performances into token ids and back, behind one protocol."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from data_pipeline.errors import UserError
from data_pipeline.settings import AugmentConfig
from data_pipeline.tokenizers.aria import AriaTokenizer
from data_pipeline.tokenizers.base import Tokenizer

__all__ = [
    "EVENTS",
    "SCHEMES",
    "AriaTokenizer",
    "Tokenizer",
    "augmentations_left_out",
    "load_scheme",
    "of_aria",
    "of_music",
]

SCHEMES = {
    "aria": "absolute onsets in segments of 5 s, a note in three tokens (Bradshaw & Colton, 2025)",
    "pedal": "aria for solo piano, with the sustain pedal as tokens",
    "musenet": "a note's beginning in one token, its end in another, waits (Payne, OpenAI 2019)",
    "piano-roll": "frames of 50 ms, in each the keys that begin or are held (Liang, BachBot 2016)",
    "remi": "bars, positions, tempo, a note in four tokens (Huang & Yang, 2020); through MidiTok",
    "midi-like": "beginnings, ends and shifts of 10 ms (Oore et al., 2018); through MidiTok",
}
"""Name of every tokenizer of music, and what it is in a line."""
EVENTS = "any event series (Parquet of series, time, channel, value); a vocabulary of each corpus"
"""The same of the one that is not of music, "events"."""


def load_scheme(name: str) -> Tokenizer:
    """Builds the tokenizer of a name in `SCHEMES`; callers use `Tokenizer.preset`."""
    from data_pipeline.tokenizers.keys import MuseNetTokenizer, PianoRollTokenizer
    from data_pipeline.tokenizers.miditok import MidiTokTokenizer

    if name in ("aria", "pedal"):
        return AriaTokenizer(name)
    schemes: dict[str, Callable[[], Tokenizer]] = {
        "musenet": MuseNetTokenizer,
        "piano-roll": PianoRollTokenizer,
        "remi": partial(MidiTokTokenizer, "remi"),
        "midi-like": partial(MidiTokTokenizer, "midi-like"),
    }
    return schemes[name]()


def of_music(tokenizer: Tokenizer, what: str) -> Tokenizer:
    """The tokenizer, unless it is one of event series.

    Args:
        what: is made of music only, e.g. "generate".

    Raises:
        UserError: it is.
    """
    if tokenizer.scheme == "events":
        raise UserError(f"{what} takes a model of music; this model's tokens are event series")
    return tokenizer


def of_aria(tokenizer: Tokenizer, what: str) -> AriaTokenizer:
    """The tokenizer, if it is Aria's or its pedal variant.

    Args:
        what: is made for their events only, e.g. "a duet".

    Raises:
        UserError: it is another.
    """
    if isinstance(tokenizer, AriaTokenizer):
        return tokenizer
    raise UserError(
        f"{what} takes the tokens of aria or pedal; this model's tokenizer is {tokenizer.scheme}"
    )


def augmentations_left_out(tokenizer: Tokenizer, config: AugmentConfig) -> tuple[str, ...]:
    """What whoever trains should know of what `augment` does not do of `config`.

    Raises:
        UserError: it is not among what is done by default, so that someone asked for it.
    """
    usual, name = AugmentConfig(), tokenizer.scheme
    undone = {
        one.name: getattr(config, one.name)
        for one in fields(AugmentConfig)
        if not one.name.endswith("_probability") and one.name not in tokenizer.augmentations
    }
    undone = {setting: value for setting, value in undone.items() if value}
    asked = [f"{s}={value}" for s, value in undone.items() if value != getattr(usual, s)]
    if asked:
        raise UserError(
            f"the {name} tokenizer cannot augment by {', '.join(asked)}; it can by "
            f"{', '.join(sorted(tokenizer.augmentations)) or 'nothing'}"
        )
    if not undone:
        return ()
    return (f"the {name} tokenizer has no augmentation of {', '.join(undone)}: left out",)
