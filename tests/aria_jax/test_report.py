"""Charts and rolls show what they were given."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from aria_jax.report import code, corpus_chart
from aria_jax.report.listening import Result
from aria_jax.report.piano_roll import COLOURS, PLAYER_SCRIPT, parts_by_instrument, player
from data_pipeline.midi import NOTE, PROGRAM, Performance
from data_pipeline.vocabulary import INSTRUMENTS


def test_a_corpus_is_drawn_with_all_its_pieces_and_labels():
    lengths = {"train": np.array([1, 5, 5, 900]), "val": np.array([40])}
    labels = {"composer": {"bach": 3, "liszt": 1}, "form": {"fugue": 2}}
    figure = corpus_chart(lengths, labels, "notes per piece")
    histogram, composer, form = figure.axes
    assert sum(patch.get_height() for patch in histogram.patches) == 5
    assert [patch.get_width() for patch in composer.patches] == [3, 1]
    assert [tick.get_text() for tick in composer.get_yticklabels()] == ["bach", "liszt"]
    assert (composer.get_title(), form.get_title()) == ("composer", "form")


def test_commands_are_not_broken_within_an_option():
    shown = code("aria-jax embed my-midis e.parquet --host-index 1 -k 2 <x>")
    assert shown == (
        "<pre>aria-jax embed my-midis e.parquet <span>--host-index</span> 1 <span>-k</span> 2 "
        "&lt;x&gt;</pre>"
    )


def test_an_empty_corpus_is_drawn_too():
    (histogram,) = corpus_chart({"train": np.zeros(0, int)}, {}, "notes per piece").axes
    assert sum(patch.get_height() for patch in histogram.patches) == 0


def band() -> Performance:
    """A bass, a flute and a kick drum, one after the other."""
    notes = np.zeros(4, NOTE)
    notes["start"], notes["end"] = [0, 500, 1000, 1500], [400, 900, 1400, 1600]
    notes["pitch"], notes["velocity"], notes["channel"] = [36, 72, 74, 35], 80, [1, 0, 0, 9]
    programs = np.array([(0, 73, 0), (0, 33, 1)], PROGRAM)
    return Performance(500, notes, programs=programs)


def test_a_roll_has_a_colour_and_a_sound_for_each_instrument():
    parts = parts_by_instrument(band())
    assert [(part.label, part.sound, len(part.pitch)) for part in parts] == [
        ("bass", "bass", 1), ("pipe", "pipe", 2), ("drums", "drums", 1),
    ]  # fmt: skip
    assert parts[2].start_ms.tolist() == [1500]
    shown = player(parts)
    content = json.loads(shown[shown.index("{") : shown.index("</script>")])
    assert content["sounds"] == ["bass", "pipe", "drums"]
    assert [note[4] for note in content["notes"]] == [0, 1, 1, 2]
    assert len(set(COLOURS)) == len(COLOURS) > len(INSTRUMENTS)


def test_every_instrument_that_tokens_have_has_a_voice():
    voices = PLAYER_SCRIPT.partition("const VOICES = {")[2].partition("};")[0]
    assert set(INSTRUMENTS) <= set(re.findall(r"^\s+(\w+):", voices, re.MULTILINE))


def test_continuations_of_a_band_are_shown_by_instrument_and_those_of_a_piano_by_whose_they_are():
    piano = Performance(500, band().notes[:2].copy())
    piano.notes["channel"] = 0
    alone = Result(piano, piano.slice_notes(0, 1), piano.slice_notes(1, 2), piano)
    assert [part.label for part in alone.parts] == ["prompt", "continuation"]
    whole = Result(band(), band().slice_notes(0, 1), band().slice_notes(1, 4), band())
    assert [part.label for part in whole.parts] == ["bass", "pipe", "drums"]
    accompanied = replace(alone, by_origin=(piano, band()))
    assert [p.label for p in accompanied.parts] == ["bass", "pipe", "drums", "piano (given)"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_player_plays_every_voice(tmp_path):
    """Against stand-ins that count what is started: a tone has a source for each partial."""
    script = PLAYER_SCRIPT.partition("<script>")[2].partition("</script>")[0]
    script = script.replace("document.addEventListener", "globalThis.parts = {tone, VOICES}; void ")
    stand_ins = """
      let started = 0;
      const node = () => ({gain: param(), frequency: param(), connect: other => other, start() { started++; }, stop() {}});
      const param = () => ({setValueAtTime() {}, linearRampToValueAtTime() {}, setTargetAtTime() {}, exponentialRampToValueAtTime() {}});
      globalThis.AudioContext = function () {
        return {sampleRate: 10, currentTime: 0, createOscillator: node, createGain: node, createBufferSource: node,
                createBiquadFilter: node, createBuffer: (_, n) => ({getChannelData: () => new Float32Array(n)})};
      };
    """  # noqa: E501
    script = script.replace(
        "let context, playing = null;", "let context = new AudioContext(), playing = null;"
    )
    check = """
      const {tone, VOICES} = globalThis.parts, counts = {};
      for (const sound of [...Object.keys(VOICES), 'sfx', 'drums']) {
        started = 0; tone(0, 1, 38, 90, node(), sound); counts[sound] = started;
      }
      console.log(JSON.stringify(counts));
    """
    (tmp_path / "page.js").write_text(stand_ins + script + check)
    told = subprocess.run(
        ["node", tmp_path / "page.js"], capture_output=True, text=True, check=True
    )
    counts = json.loads(told.stdout)
    assert counts.pop("drums") == 2  # a snare: a tone and noise
    assert counts["sfx"] == counts["piano"] == 3 and all(2 <= n <= 3 for n in counts.values())
