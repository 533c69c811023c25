"""The former place of Aria's tokenizer: `data_pipeline.tokenizers`."""

from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import FAMILIES, INSTRUMENTS, SEGMENT_MS, STEP_MS, Kind

__all__ = ["FAMILIES", "INSTRUMENTS", "SEGMENT_MS", "STEP_MS", "Kind", "Tokenizer"]
