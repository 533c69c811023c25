"""Every id, note and millisecond as the reference computes it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.midi import NOTE, TEMPO, Performance, read_midi, resolve_pedal
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import INSTRUMENTS

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
    from data_pipeline.vocabulary import FAMILIES

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


def one_tempo_and_programs(performance: Performance) -> bool:
    """Whether one tempo holds, and on each channel one program from its first note on."""
    if len(performance.tempi) > 1 or performance.tempi["tick"][0] > 0:
        return False
    notes, programs = performance.notes, performance.programs
    for channel in np.unique(notes["channel"]):
        changes = programs[programs["channel"] == channel]
        first = notes["start"][notes["channel"] == channel].min()
        if len(np.unique(changes["program"])) > 1 or (changes["tick"][:1] > first).any():
            return False
    return True


def test_both_readings_give_the_same_ids_for_one_tempo_and_one_program_per_channel(real_midi):
    n_same = 0
    for path in sorted(real_midi.rglob("*.mid")):
        standard, reference = (read_midi(path, compat=c) for c in (None, "aria-utils"))
        if one_tempo_and_programs(reference):
            assert np.array_equal(TOKENIZER.encode(standard), TOKENIZER.encode(reference)), path
            n_same += 1
    assert n_same > 1000


def test_an_onset_below_zero_is_counted_as_the_reference_counts():
    # The reference's clock begins below 0 where the first note lies behind a tempo change: the
    # first `<T>` is written when it has come to 0.
    notes = np.array([(60, 64, 0, 0, 50), (62, 64, 0, 2000, 2025), (63, 64, 0, 2100, 2125)], NOTE)
    tempi = np.array([(0, 1_000_000), (10, 500_000)], TEMPO)
    notes["start"] += 2000
    notes["end"] += 2000
    performance = Performance(500, notes, tempi=tempi, compat="aria-utils")
    at, onsets_ms = TOKENIZER.events(ids := TOKENIZER.encode(performance))
    assert onsets_ms.tolist() == [3010, 5010, 5110]  # -1990, 10, 110
    assert ids.tolist().index(TOKENIZER.time_id) > at[0]
    standard = TOKENIZER.events(TOKENIZER.encode(replace(performance, compat=None)))[1]
    assert standard.tolist() == [0, 2000, 2100]


@pytest.mark.parametrize("name", ["aria", "pedal"])
def test_a_preset_has_its_size(name):
    assert Tokenizer.preset(name).vocab_size == {"aria": 17_727, "pedal": 17_729}[name]
