"""How much augmentation changes (apart from `augment`: reading settings compiles nothing)."""

from dataclasses import dataclass

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """How much each piece is changed, at most; the defaults are the reference's.

    Attributes:
        tempo: factor of all times, drawn from 1 ± tempo.
        pitch: semitones of transposition, drawn from ± pitch.
        velocity: steps of 10, drawn from ± velocity.
        mixup: shuffle the notes of one onset.
        rubato: greatest deviation of the local tempo, which swings smoothly over 5 to 20 s.
        rubato_probability: how likely a piece gets a rubato.
        velocity_curve: greatest height in steps of 10 of a slow swell of the velocity.
        velocity_curve_probability: how likely a piece gets one.
        note_drop: greatest share of notes that is left out.
        note_drop_probability: how likely a piece loses notes.
        sustain: all durations, but not onsets, times a factor drawn from 1 ± sustain.
        sustain_probability: how likely a piece's durations change.
    """

    tempo: float = 0.2
    pitch: int = 5
    velocity: int = 1
    mixup: bool = True
    rubato: float = 0.0
    rubato_probability: float = 0.5
    velocity_curve: float = 0.0
    velocity_curve_probability: float = 0.5
    note_drop: float = 0.0
    note_drop_probability: float = 0.5
    sustain: float = 0.0
    sustain_probability: float = 0.5

    def __post_init__(self) -> None:
        shares = ("tempo", "rubato", "note_drop", "sustain")
        bounds = dict.fromkeys(shares, 0.95) | {"pitch": 127, "velocity": 12, "velocity_curve": 12}
        bounds |= {name: 1 for name in self.__dataclass_fields__ if name.endswith("_probability")}
        wrong = [
            f"{name}={getattr(self, name)} must lie in [0, {bound}]"
            for name, bound in bounds.items()
            if not 0 <= getattr(self, name) <= bound
        ]
        if wrong:
            raise UserError("augmentation: " + "; ".join(wrong))
