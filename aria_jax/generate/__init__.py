"""Continuing a performance: cache, sampling, grammar."""

from aria_jax import make_callable

make_callable(__name__)
