"""What a player's page may say, with the limits of everything it says."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_pipeline.errors import UserError

MAX_T = 2**31 - 1
MAX_MIDI = 1 << 20
"""Bytes of a MIDI file."""
MAX_MESSAGE = 4 * MAX_MIDI // 3 + 4096
"""Bytes of a message: a MIDI file as base64."""

Time = Annotated[int, Field(ge=0, le=MAX_T)]
Pitch = Annotated[int, Field(ge=21, le=108)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Timed(_Message):
    t: Time


class Hello(_Message):
    """The first message; with the name of a session that goes on."""

    type: Literal["hello"]
    session: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None


class NoteOn(_Timed):
    """A key goes down."""

    type: Literal["note_on"]
    pitch: Pitch
    velocity: Annotated[int, Field(ge=1, le=127)]


class NoteOff(_Timed):
    """A key goes up."""

    type: Literal["note_off"]
    pitch: Pitch


class Pedal(_Timed):
    """The sustain pedal."""

    type: Literal["pedal"]
    value: Annotated[int, Field(ge=0, le=127)]


class SettingsChange(_Timed):
    """Fields of `generate.live.engine.Settings`."""

    type: Literal["settings"]
    temperature: Annotated[float, Field(strict=False)] | None = None
    min_p: Annotated[float, Field(strict=False)] | None = None
    density: Annotated[float, Field(strict=False)] | None = None
    length_ms: int | None = None
    silence_ms: int | None = None


class Choose(_Timed):
    """One of the answers that were offered."""

    type: Literal["choose"]
    take: Annotated[int, Field(ge=0, le=2)]


class Load(_Timed):
    """A MIDI file, as base64, to go on from."""

    type: Literal["load"]
    data: Annotated[str, Field(max_length=MAX_MESSAGE)]
    seconds: Annotated[int, Field(ge=1, le=600)] = 30


class Plain(_Timed):
    """What needs no more than its time; hand_over: `lag`, ms that a message takes one way."""

    type: Literal["hand_over", "take_over", "undo", "takes", "clock", "save", "bye"]
    lag: Annotated[int, Field(ge=0, le=1000)] = 0


Message = Annotated[
    Hello | NoteOn | NoteOff | Pedal | SettingsChange | Choose | Load | Plain,
    Field(discriminator="type"),
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Message)


def read_message(text: str) -> Any:
    """A message as one of the classes here.

    Raises:
        UserError: it is none, or beyond the limits.
    """
    try:
        return _ADAPTER.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "message"
        raise UserError(f"{place}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise UserError("this message is no JSON") from None
