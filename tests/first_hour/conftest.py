"""What the uses of the table need: files, a corpus, models; all made once."""

import json
from pathlib import Path

import numpy as np
import pytest

from aria_jax.cli.main import main
from data_pipeline.midi import NOTE, Performance, read_midi, write_midi
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import once
from tests.first_hour.uses import Use, check


@pytest.fixture(scope="session")
def places(midi_corpus, tiny_models, tmp_path_factory) -> dict[str, Path]:
    """Names that commands of the table use in braces.

    midi: ten MIDI files with labels; piece, query: two of them; data: their token shards; lm,
    encoder, classifier: models; vectors, counts: embeddings; ids: token ids as JSON; text: a file
    that is no MIDI; silent: MIDI without notes; empty: an empty folder; nothing: no such path.
    """
    found = {
        "midi": midi_corpus,
        "piece": midi_corpus / "lento_0.mid",
        "query": midi_corpus / "presto_1.mid",
        **tiny_models,
    }
    names = ("data", "vectors.parquet", "counts.parquet", "slices.parquet", "ids.json", "text.mid",
             "silent.mid", "empty", "nothing")  # fmt: skip

    def named(folder: Path) -> dict[str, Path]:
        return {**found, **{name.partition(".")[0]: folder / name for name in names}}

    return named(once(tmp_path_factory, "first-hour", lambda folder: _make(named(folder))))


def _make(found: dict[str, Path]) -> None:
    found["text"].write_text("this is no MIDI file")
    write_midi(Performance(480, np.zeros(0, NOTE)), found["silent"])
    found["empty"].mkdir()
    notes = read_midi(found["piece"]).slice_notes(0, 20)
    ids = Tokenizer.preset("aria").encode(notes, add_eos=False)
    found["ids"].write_text(json.dumps({"ids": ids.tolist()}))
    midi, data = str(found["midi"]), str(found["data"])
    build = ["data", "build", midi, data, "--val-fraction", "0.2", "--filters", "none"]
    assert main([*build, "--workers", "1"]) == 0
    encoder = ["--checkpoint", str(found["encoder"]), "--workers", "0"]
    counting = ["--baseline", "pitch-class", "--workers", "0"]
    assert main(["embed", midi, str(found["vectors"]), *encoder]) == 0
    assert main(["embed", midi, str(found["slices"]), "--per-slice", *encoder]) == 0
    assert main(["embed", midi, str(found["counts"]), *counting]) == 0


@pytest.fixture
def run_use(places, tmp_path):
    """Runs one row of the table in a folder of its own."""

    def run(use: Use) -> None:
        check(use, places, tmp_path)

    return run
