"""Charts show the numbers they were given."""

import numpy as np

from aria_jax.report import code, corpus_chart


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
