"""One loop, five tasks."""

from aria_jax import make_callable

make_callable(__name__)
