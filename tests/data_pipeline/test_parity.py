"""Every id, note and millisecond as the reference computes it."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.midi import read_midi, resolve_pedal
from data_pipeline.tokenizer import INSTRUMENTS, Tokenizer

TOKENIZER = Tokenizer.preset("aria")


def golden_files(golden: Path, folder: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((golden / folder).glob("*.json"))]


def test_the_vocabulary_is_the_references(golden):
    expected = json.loads((golden / "vocab.json").read_text())
    assert [list(t) if isinstance(t, tuple) else t for t in TOKENIZER.tokens] == expected


def test_ids_of_every_file(golden, golden_midi):
    for case in golden_files(golden, "tokenizer"):
        performance = read_midi(golden_midi / case["midi"], compat="aria-utils")
        assert len(performance.notes) == case["num_notes"], case["midi"]
        ids = TOKENIZER.encode(performance).tolist()
        start = ids.index(TOKENIZER.bos_id)
        assert ids[:start] == case["prefix_ids"], case["midi"]
        assert ids[start:] == case["body_ids"], case["midi"]
        if "body_ids_keep_silence" in case:
            silent = TOKENIZER.encode(performance, remove_preceding_silence=False).tolist()
            assert silent[start:] == case["body_ids_keep_silence"], case["midi"]


def test_notes_of_every_detokenised_file(golden):
    for case in golden_files(golden, "detokenize"):
        performance = TOKENIZER.decode(np.array(case["ids"]))
        programs = {int(r["channel"]): int(r["program"]) for r in performance.programs}
        found = [
            [
                int(n["pitch"]),
                int(n["start"]),
                int(n["end"]),
                int(n["velocity"]),
                "drum" if n["channel"] == 9 else instrument_name(programs[int(n["channel"])]),
            ]
            for n in performance.notes
        ]
        assert found == case["notes"], case.get("midi")


def instrument_name(program: int) -> str:
    from data_pipeline.tokenizer import FAMILIES

    assert FAMILIES[program // 8] in INSTRUMENTS
    return FAMILIES[program // 8]


def test_parsed_notes_tempi_and_pedals_of_every_file(golden, golden_midi):
    for case in golden_files(golden, "midi"):
        p = read_midi(golden_midi / case["midi"], compat="aria-utils")
        assert p.ticks_per_beat == case["ticks_per_beat"]
        columns = ("pitch", "start", "end", "velocity", "channel")
        assert [[int(n[c]) for c in columns] for n in p.notes] == case["notes_ticks"], case["midi"]
        ms = np.stack([p.ms(p.notes["start"]), p.ms(p.notes["end"])], 1).tolist()
        assert ms == case["notes_ms"], case["midi"]
        assert [[int(r["tick"]), int(r["tempo"])] for r in p.tempi] == case["tempo"]
        pedals = [[int(r["tick"]), int(r["value"]), int(r["channel"])] for r in p.pedals]
        assert pedals == case["pedals"]
        r = resolve_pedal(p)
        rows = zip(r.notes["pitch"], r.ms(r.notes["start"]), r.ms(r.notes["end"]), strict=True)
        assert sorted([int(a), int(b), int(c)] for a, b, c in rows) == case["pedal_resolved_ms"]


@pytest.mark.parametrize("name", ["aria", "pedal"])
def test_a_preset_has_its_size(name):
    assert Tokenizer.preset(name).vocab_size == {"aria": 17_727, "pedal": 17_729}[name]
