"""Schemes that turn performances into token ids and back, behind one protocol."""

from data_pipeline.errors import UserError
from data_pipeline.tokenizers.aria import AriaTokenizer
from data_pipeline.tokenizers.base import Tokenizer

__all__ = ["SCHEMES", "AriaTokenizer", "Tokenizer", "load_scheme", "of_aria"]

SCHEMES = {
    "aria": "absolute onsets in segments of 5 s, a note in three tokens (Bradshaw & Colton, 2025)",
    "pedal": "aria for solo piano, with the sustain pedal as tokens",
}
"""Name of every tokenizer, and what it is in a line."""


def load_scheme(name: str) -> Tokenizer:
    """Builds the tokenizer of a name in `SCHEMES`; callers use `Tokenizer.preset`."""
    return AriaTokenizer(name)


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
