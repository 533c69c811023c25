"""Broken MIDI files cost an `InvalidMidi` at worst, in both readings, repaired or not: no other
error, no hang, no gigabytes. What was read can be written and reads back.

ARIA_JAX_FUZZ sets how many files are tried (default 5,000); `make fuzz` tries many more.
"""

import os
import time
from dataclasses import replace

import numpy as np

from data_pipeline import filters
from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import (
    DRUM_CHANNEL,
    MAX_HOURS,
    midi_bytes,
    read_midi,
    resolve_overlaps,
    resolve_pedal,
)
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance
from tests.smf import random_file

N_FILES = int(os.environ.get("ARIA_JAX_FUZZ", "5000"))
EVIL = np.array([0, 0x2F, 0x51, 0x7F, 0x80, 0x90, 0xB0, 0xF0, 0xF7, 0xF8, 0xFF], np.uint8)


def mutated(rng: np.random.Generator, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.integers(1, 8)):
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
        match rng.integers(5):
            case 0:
                data[at] = rng.integers(256)
            case 1:
                data[at] = rng.choice(EVIL)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.bytes(length)
            case _:
                data[at:at] = data[at : at + 10 * length]
    return bytes(data)


def use(data: bytes, preset: str, compat: str | None, repair: bool) -> int:
    """Number of ids, after everything a build does with a file."""
    performance = read_midi(data, compat=compat, repair=repair)
    filters.check(performance, filters.PRESETS["heavy"])
    resolve_pedal(performance)
    tokenizer = Tokenizer.preset(preset)
    ids = tokenizer.encode(performance)
    assert tokenizer.n_notes(ids) <= len(performance.notes)
    tokenizer.decode(ids)
    if compat is None:
        written = resolve_overlaps(performance)  # what remains is what a file can hold
        notes = written.notes
        whole = notes[(notes["end"] > notes["start"]) | (notes["channel"] == DRUM_CHANNEL)]
        assert read_midi(midi_bytes(written)) == replace(written, notes=whole, repaired="")
    return len(ids)


def test_mutated_files_raise_nothing_but_invalid_midi():
    rng = np.random.default_rng(0)
    seeds = [midi_bytes(random_performance(rng, 40)), random_file(rng), random_file(rng)]
    most = MAX_HOURS * 720 + 3 * max(map(len, seeds))
    reasons, slowest = {}, 0.0
    for data in seeds:
        use(data, "aria", None, False)  # compiles
    for i in range(N_FILES):
        data = mutated(rng, seeds[i % len(seeds)])
        began = time.process_time()
        try:
            preset, compat = "pedal" if i % 4 == 0 else "aria", (None, "aria-utils")[i % 2]
            assert use(data, preset, compat, repair=i % 5 == 0) < most
            reason = None
        except InvalidMidi as error:
            reason = error.reason
        slowest = max(slowest, time.process_time() - began)
        reasons[reason] = reasons.get(reason, 0) + 1
    assert slowest < 5, "seconds for a file of a kilobyte"
    assert reasons[None] > N_FILES / 50, "mutations that leave the file readable are tried too"
    assert len(reasons) > 5, reasons
