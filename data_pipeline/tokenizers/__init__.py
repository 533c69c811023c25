"""Schemes that turn performances into token ids and back, behind one protocol."""

from collections.abc import Callable
from functools import partial

from data_pipeline.errors import UserError
from data_pipeline.tokenizers.aria import AriaTokenizer
from data_pipeline.tokenizers.base import Tokenizer

__all__ = ["SCHEMES", "AriaTokenizer", "Tokenizer", "load_scheme", "of_aria"]

SCHEMES = {
    "aria": "absolute onsets in segments of 5 s, a note in three tokens (Bradshaw & Colton, 2025)",
    "pedal": "aria for solo piano, with the sustain pedal as tokens",
    "musenet": "a note's beginning in one token, its end in another, waits (Payne, OpenAI 2019)",
    "piano-roll": "frames of 50 ms, in each the keys that begin or are held (Liang, BachBot 2016)",
    "remi": "bars, positions, tempo, a note in four tokens (Huang & Yang, 2020); through MidiTok",
    "midi-like": "beginnings, ends and shifts of 10 ms (Oore et al., 2018); through MidiTok",
}
"""Name of every tokenizer, and what it is in a line."""


def load_scheme(name: str) -> Tokenizer:
    """Builds the tokenizer of a name in `SCHEMES`; callers use `Tokenizer.preset`."""
    from data_pipeline.tokenizers.miditok import MidiTokTokenizer
    from data_pipeline.tokenizers.musenet import MuseNetTokenizer
    from data_pipeline.tokenizers.piano_roll import PianoRollTokenizer

    if name in ("aria", "pedal"):
        return AriaTokenizer(name)
    schemes: dict[str, Callable[[], Tokenizer]] = {
        "musenet": MuseNetTokenizer,
        "piano-roll": PianoRollTokenizer,
        "remi": partial(MidiTokTokenizer, "remi"),
        "midi-like": partial(MidiTokTokenizer, "midi-like"),
    }
    return schemes[name]()


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
        f"{what} takes the tokens of aria or pedal; this model's tokenizer is "
        f"{tokenizer.preset_name}"
    )
