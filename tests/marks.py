"""Which cases of a test run in `make test-slow` alone."""

from collections.abc import Collection, Iterable

import pytest


def slow_among(cases: Iterable, slow: Collection) -> list:
    """`cases` for `pytest.mark.parametrize`, of which those in `slow` are marked so."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[pytest.mark.slow] * (case in slow),
        )
        for case in cases
    ]
