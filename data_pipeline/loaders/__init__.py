"""Batches of token shards, as Grain delivers them to a training loop.

Every loader is a `BatchStream`: batch number `step` is a function of (seed, step) and nothing
else, so resuming is starting at another step, and any rows of it can be had alone: no loader knows
how many hosts, devices or worker processes there are.
"""

from data_pipeline.loaders.slice_batches import contrastive_pairs, label_values, labelled_slices
from data_pipeline.loaders.stream import BatchStream
from data_pipeline.loaders.windows import lm_windows

__all__ = ["BatchStream", "contrastive_pairs", "label_values", "labelled_slices", "lm_windows"]
