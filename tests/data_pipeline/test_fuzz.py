"""Broken MIDI files cost an `InvalidMidi` at worst: no other error, no hang, no gigabytes.

ARIA_JAX_FUZZ sets how many files are tried (default 5,000); `make fuzz` tries many more.
"""

import os
import time

import numpy as np

from data_pipeline import filters
from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import MAX_HOURS, midi_bytes, read_midi, resolve_pedal
from data_pipeline.tokenizer import Tokenizer
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


def use(data: bytes, preset: str) -> int:
    """Number of ids, after everything a build does with a file."""
    performance = read_midi(data)
    filters.check(performance, filters.PRESETS["heavy"])
    resolve_pedal(performance)
    tokenizer = Tokenizer.preset(preset)
    ids = tokenizer.encode(performance)
    assert tokenizer.n_notes(ids) <= len(performance.notes)
    tokenizer.decode(ids)
    return len(ids)


def test_mutated_files_raise_nothing_but_invalid_midi():
    rng = np.random.default_rng(0)
    seeds = [midi_bytes(random_performance(rng, 40)), random_file(rng), random_file(rng)]
    most = MAX_HOURS * 720 + 3 * max(map(len, seeds))
    reasons, slowest = {}, 0.0
    for data in seeds:
        use(data, "aria")  # compiles
    for i in range(N_FILES):
        data = mutated(rng, seeds[i % len(seeds)])
        began = time.process_time()
        try:
            assert use(data, "pedal" if i % 4 == 0 else "aria") < most
            reason = None
        except InvalidMidi as error:
            reason = error.reason
        slowest = max(slowest, time.process_time() - began)
        reasons[reason] = reasons.get(reason, 0) + 1
    assert slowest < 5, "seconds for a file of a kilobyte"
    assert reasons[None] > N_FILES / 50, "mutations that leave the file readable are tried too"
    assert len(reasons) > 5, reasons
