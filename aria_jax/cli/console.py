"""What the command line shows: progress bars and results, for a person or for a script."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from data_pipeline.errors import UserError, printable

Progress = Callable[[int, int], None]
"""Libraries report `progress(done, total)`; they never print."""


@contextmanager
def progress_bar(description: str, unit: str):
    """Yields a `Progress` callback that draws a bar with rate and time left on stderr.

    The callback also takes `note=`, a few words to stand behind the bar.
    """
    from tqdm import tqdm

    bars: list[tqdm] = []

    def update(done: int, total: int, note: str = "") -> None:
        if not bars:  # drawn with the first news only: an error before it stays one line
            bars.append(tqdm(desc=description, unit=unit, dynamic_ncols=True, file=sys.stderr))
        bar = bars[0]
        bar.total = total
        if note:
            bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    try:
        yield update
    finally:
        for bar in bars:
            bar.close()


def print_result(
    result: dict[str, Any], as_json: bool, text: str, warnings: Sequence[str] = ()
) -> None:
    """Prints `result` as one JSON line where a script asked for it, else `text`.

    Names that are not UTF-8 are shown as `printable`; warnings go to stderr.
    """
    for warning in warnings:
        print(f"aria-jax: warning: {warning}", file=sys.stderr)
    print(json.dumps(_printable(result)) if as_json else printable(text))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value


def numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers of a comma-separated argument, in ascending order."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text}: expected positive numbers such as 1,5,10")
    return sorted({int(part) for part in parts})
