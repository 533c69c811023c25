"""Embeddings of many files, and search among them."""

from aria_jax import make_callable

make_callable(__name__)
