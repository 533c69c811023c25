"""Settings: frozen dataclasses whose fields declare, where they are defined, what they may hold.

    n_heads: Annotated[int, Range(1)] = 24
    \"\"\"Attention heads.\"\"\"

`settings_of` and `field_docs` read type, range, default and docstring from there, so that checking,
parsing and listing need no table of their own. Also the one class of settings of this package,
`AugmentConfig`; reading it compiles nothing.
"""

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from data_pipeline.errors import UserError

MAX_INT = 2**32 - 1
"""Of any whole number: seeds and counts are handed to 32-bit generators and arrays."""


@dataclass(frozen=True)
class Range:
    """The numbers a field may hold, e.g. `Annotated[float, Range(0, 1, below=True)]` for [0, 1).

    Attributes:
        low, high: the bounds.
        above, below: whether `low`, `high` themselves are left out.
        also: further values, e.g. (-1,).
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        from_low = value > self.low if self.above else value >= self.low
        return from_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            text = f"be {'above' if self.above else 'at least'} {self.low:g}"
        else:
            brackets = "(" if self.above else "[", ")" if self.below else "]"
            text = f"lie in {brackets[0]}{self.low:g}, {self.high:g}{brackets[1]}"
        return text + "".join(f" or be {value:g}" for value in self.also)


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass of settings.

    Attributes:
        name: of the field.
        hint: its type without the range.
        range: of its numbers; None where any, or none, will do.
        default: value it has unless told otherwise.
    """

    name: str
    hint: Any
    range: Range | None
    default: Any

    @property
    def type_name(self) -> str:
        """The type in words: "int", "float or none", "one of linear, cosine", "list of str"."""
        return _type_name(self.hint)

    def problem(self, value: Any) -> str | None:
        """Why the field may not hold `value`, as the end of a sentence; None where it may."""
        return _problem(value, self.hint, self.range)

    def read(self, value: Any) -> Any:
        """Text, or what JSON and YAML know, as the field's type; its range is not looked at.

        Raises:
            ValueError: text that is not of the type; the message is the end of a sentence.
        """
        if isinstance(value, str):
            return _parse(value, self.hint)
        if isinstance(value, list):
            return tuple(value)
        whole = (_optional(self.hint) or self.hint) is int
        return int(value) if whole and isinstance(value, float) and value.is_integer() else value


def settings_of(cls: type) -> tuple[Setting, ...]:
    """The fields of a dataclass of settings, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint, bounds = _without_range(hints[field.name])
        found.append(Setting(field.name, hint, bounds, default))
    return tuple(found)


def field_docs(cls: type) -> dict[str, str]:
    """The docstring behind each field of a dataclass, on one line."""
    [node] = ast.parse(inspect.getsource(cls)).body
    docs = {}
    for field, behind in itertools.pairwise(typing.cast(ast.ClassDef, node).body):
        if isinstance(field, ast.AnnAssign) and isinstance(behind, ast.Expr):
            literal = behind.value
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                docs[typing.cast(ast.Name, field.target).id] = " ".join(literal.value.split())
    return docs


def problems_of(config: Any, prefix: str = "") -> dict[str, str]:
    """A sentence about each field of `config` that holds what it may not, by name of the field."""
    found = {}
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        if (problem := setting.problem(value)) is not None:
            found[setting.name] = f"{prefix}{setting.name}={value} {problem}"
    return found


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`; unknown keys raise `UserError` (a newer version wrote them)."""
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise UserError(
            f"{cls.__name__} has no {', '.join(sorted(unknown))}: "
            "was this file written by a newer aria_jax?"
        )
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(typing.cast(type, hints[name]), value)
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made)


def _without_range(hint: Any) -> tuple[Any, Range | None]:
    """The bare type, and the range of its numbers, which may stand inside a union with None."""
    if typing.get_origin(hint) is Annotated:
        bare, *extras = typing.get_args(hint)
        return bare, next((extra for extra in extras if isinstance(extra, Range)), None)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_without_range(part) for part in typing.get_args(hint)]
        bounds = next((bounds for _, bounds in parts if bounds is not None), None)
        return typing.Union[tuple(bare for bare, _ in parts)], bounds  # noqa: UP007
    return hint, None


def _optional(hint: Any) -> Any | None:
    """The type that may also be None; None where `hint` is no such union."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    return next(part for part in typing.get_args(hint) if part is not type(None))


def _type_name(hint: Any) -> str:
    if (inner := _optional(hint)) is not None:
        return f"{_type_name(inner)} or none"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    return hint.__name__


def _problem(value: Any, hint: Any, bounds: Range | None) -> str | None:
    if (inner := _optional(hint)) is not None:
        return None if value is None else _problem(value, inner, bounds)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return None if value in arguments else f"must be {_type_name(hint)}"
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return f"must be a {_type_name(hint)}"
        return next(filter(None, (_problem(part, arguments[0], bounds) for part in value)), None)
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        return f"must be of type {_type_name(hint)}"
    if isinstance(value, str):
        return None if value.strip() else "must not be empty"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if bounds is not None and value not in bounds:
        return f"must {bounds}"
    if isinstance(value, int) and value > MAX_INT:
        return f"must be at most {MAX_INT}"
    return None


def _parse(text: str, hint: Any) -> Any:
    if (inner := _optional(hint)) is not None:
        return None if text.lower() in ("none", "null") else _parse(text, inner)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if text not in arguments:
            raise ValueError(f"must be {_type_name(hint)}")
        return text
    if typing.get_origin(hint) is tuple:
        return tuple(_parse(part.strip(), arguments[0]) for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("must be true or false")
        return text.lower() in ("true", "1")
    try:
        if hint is not int:
            return hint(text)
        if text.lower().lstrip("+-").replace("_", "").isdecimal():
            return int(text)
        number = float(text)  # 1e3
        if not number.is_integer():
            raise ValueError
        return int(number)
    except (ValueError, OverflowError):
        raise ValueError(f"must be of type {_type_name(hint)}") from None


def text_of_settings(
    sections: Mapping[str, type], rows: Iterable[Mapping[str, Any]], preset: str
) -> str:
    """Settings grouped by section, for a person.

    Args:
        sections: class of each section by its name.
        rows: name, type, range, default, preset and doc of each setting.
        preset: what the values under "preset" are of.
    """
    lines: list[str] = []
    for section, cls in sections.items():
        lines += ["", f"{section}: {(cls.__doc__ or '').strip().splitlines()[0]}"]
        for row in rows:
            if not row["name"].startswith(f"{section}."):
                continue
            limits = "" if row["range"] is None else f", {row['range']}"
            text = f"  {row['name'].partition('.')[2]}={_shown(row['default'])}"
            if row.get("preset", row["default"]) != row["default"]:
                text += f"  ({preset}: {_shown(row['preset'])})"
            lines.append(f"{text}  [{row['type']}{limits}]")
            lines += textwrap.wrap(
                row["doc"], 96, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines[1:])


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else f"{value}"


OF_SERIES = frozenset(("jitter", "channel_dropout", "channel_permutation"))
"""Settings of `AugmentConfig` that music has no use for."""
Share = Annotated[float, Range(0, 0.95)]
Probability = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class AugmentConfig:
    """How much each piece is changed, at most; the defaults are the reference's.

    Raises:
        UserError: a value outside its range.
    """

    tempo: Share = 0.2
    """All times are multiplied by a factor drawn from 1 ± tempo."""
    pitch: Annotated[int, Range(0, 127)] = 5
    """Semitones of transposition, drawn from ± pitch."""
    velocity: Annotated[int, Range(0, 12)] = 1
    """Steps of 10, drawn from ± velocity."""
    mixup: bool = True
    """Whether the notes of one onset are shuffled."""
    rubato: Share = 0.0
    """Greatest deviation of the local tempo, which varies smoothly over 5 to 20 s."""
    rubato_probability: Probability = 0.5
    """How likely a piece gets a rubato."""
    velocity_curve: Annotated[float, Range(0, 12)] = 0.0
    """Greatest height, in steps of 10, of a slow modulation of the velocity."""
    velocity_curve_probability: Probability = 0.5
    """How likely a piece gets one."""
    note_drop: Share = 0.0
    """Greatest share of notes that is left out."""
    note_drop_probability: Probability = 0.5
    """How likely a piece loses notes."""
    sustain: Share = 0.0
    """All durations, but not onsets, are multiplied by a factor drawn from 1 ± sustain."""
    sustain_probability: Probability = 0.5
    """How likely a piece's durations change."""
    instrument_velocity: Annotated[int, Range(0, 12)] = 0
    """Steps of 10, drawn from ± instrument_velocity for each instrument, besides `velocity`."""
    instrument_drop: Share = 0.0
    """How likely each instrument is left out, drums too, but not the one that begins."""
    jitter: Share = 0.0
    """Of event series: each wait is multiplied by a factor of its own, drawn from 1 ± jitter."""
    channel_dropout: Share = 0.0
    """Of event series: how likely each channel is left out."""
    channel_permutation: bool = False
    """Of event series: whether the channels of a group come in each other's place."""

    def __post_init__(self) -> None:
        if found := problems_of(self):
            raise UserError("augmentation: " + "; ".join(found.values()))
