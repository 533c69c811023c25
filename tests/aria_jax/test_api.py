"""What `import aria_jax` offers: lazily, documented, with errors that say what was expected."""

import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import aria_jax
from aria_jax.embed.table import read_embeddings
from data_pipeline.errors import UserError
from data_pipeline.midi import read_midi
from tests.corpora import random_performance

ROOT = Path(__file__).parents[2]


def test_importing_takes_nothing_along():
    code = (
        "import sys; before = set(sys.modules); import aria_jax; dir(aria_jax)\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    taken = set(re.findall(r"'(\w+)'", result.stdout)) - {"aria_jax"}
    assert taken <= sys.stdlib_module_names, taken


def test_there_are_about_forty_names_all_of_them_documented():
    assert 35 <= len(aria_jax.__all__) <= 50 and set(aria_jax.__all__) <= set(dir(aria_jax))
    for name in aria_jax.__all__:
        found = getattr(aria_jax, name)
        assert callable(found), name
        assert inspect.getdoc(inspect.unwrap(found)), name


def test_a_room_stays_a_room_when_its_modules_are_imported():
    code = (
        "import aria_jax\nfrom aria_jax import embed\nimport aria_jax.generate.sampler as sampler\n"
        "import aria_jax.train.step, aria_jax.embed.pieces\n"
        "assert callable(aria_jax.generate) and callable(aria_jax.train) and embed.pieces\n"
        "assert aria_jax.generate.sampler is sampler"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'contrastive_loss'"):
        _ = aria_jax.contrastiv_loss


def test_the_page_of_names_is_up_to_date():
    text = runpy.run_path(str(ROOT / "docs" / "generate_api.py"))["text"]()
    assert (ROOT / "docs" / "api.md").read_text() == text, "run `make api-docs`"


def test_the_five_lines_of_the_readme_run(tiny_models, midi_corpus, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert [len(block.replace("\n\n", "\n").splitlines()) for block in blocks] == [5, 5]
    monkeypatch.chdir(tmp_path)
    for name, model in (("run1", "lm"), ("run2", "encoder")):
        (tmp_path / name).symlink_to(tiny_models[model])
    shutil.copytree(midi_corpus, "my_midis")
    shutil.copy(midi_corpus / "lento_0.mid", "some.mid")
    rng = np.random.default_rng(0)
    made = {"z1": rng.normal(size=(6, 4)), "z2": rng.normal(size=(6, 4))}
    short = blocks[1].replace("seconds=15", "seconds=5, max_tokens=30")
    for block in (blocks[0], short):
        exec(block, made)
    assert len(made["table"].path) == 10
    assert made["nearest"][0].path == "lento_0.mid"
    assert len(made["found"]) == 4 and len(read_midi("continued.mid").notes) > 10
    assert float(made["loss"]) > 0 and 0 <= made["metrics"]["retrieval"] <= 1


def test_embedding_in_python_is_what_the_command_writes(tiny_models, midi_corpus, tmp_path):
    from aria_jax.cli.main import main

    out = tmp_path / "emb.parquet"
    checkpoint = ["--checkpoint", str(tiny_models["encoder"]), "--workers", "0"]
    assert main(["embed", str(midi_corpus), str(out), *checkpoint]) == 0
    written, table = read_embeddings(out), aria_jax.embed(tiny_models["encoder"], midi_corpus)
    assert table.path == written.path and table.labels == written.labels
    np.testing.assert_allclose(table.embedding, written.embedding, atol=1e-6)
    one = midi_corpus / written.path[3]
    for source in (one, str(one), read_midi(one)):
        # Batches of another size sum in another order.
        vector = aria_jax.embed(tiny_models["encoder"], source)
        np.testing.assert_allclose(vector, written.embedding[3], atol=1e-5)
    listed = aria_jax.embed(tiny_models["encoder"], [one, midi_corpus / written.path[0]])
    np.testing.assert_allclose(listed.embedding, written.embedding[[3, 0]], atol=1e-5)


def test_what_cannot_be_embedded_is_left_out_with_a_warning(tiny_models, midi_corpus, tmp_path):
    shutil.copy(midi_corpus / "lento_0.mid", tmp_path / "a.mid")
    (tmp_path / "b.mid").write_text("no MIDI")
    with pytest.warns(UserWarning, match=r"left out: b\.mid: .*not a MIDI file"):
        assert aria_jax.embed(tiny_models["encoder"], tmp_path).path == ["a.mid"]


def test_generating_and_scoring_follow_seed_and_prompt(tiny_models):
    prompt = random_performance(np.random.default_rng(1), 40)
    model = aria_jax.load(tiny_models["lm"])
    first, second = (
        aria_jax.generate(model, prompt, seconds=3, n=2, max_tokens=24, seed=4) for _ in range(2)
    )
    assert [c.ids.tolist() for c in first] == [c.ids.tolist() for c in second]
    assert len(first[0].full.notes) == len(first[0].prompt.notes) + first[0].n_notes
    alone, listed = aria_jax.score(model, prompt), aria_jax.score(model, [prompt, prompt])
    assert alone.mean_nll == pytest.approx(listed[1].mean_nll, rel=1e-5)


def test_tokens_go_both_ways():
    performance = random_performance(np.random.default_rng(2), 50)
    ids = aria_jax.tokenise(performance)
    assert aria_jax.tokenise(aria_jax.detokenise(ids.tolist())).tolist() == ids.tolist()


def test_the_loss_of_two_arrays_has_the_papers_temperature():
    rng = np.random.default_rng(3)
    z1, z2 = (rng.normal(size=(5, 8)).astype(np.float32) for _ in range(2))
    loss, _ = aria_jax.contrastive_loss(z1, z2)
    assert float(loss) == float(aria_jax.contrastive_loss(z1, z2, temperature=0.1)[0])
    hidden, head = jnp.ones((1, 3, 4)), jnp.zeros((4, 7))
    loss, _ = aria_jax.next_token_loss(hidden, head, jnp.zeros((1, 3), int))
    assert float(loss) == pytest.approx(np.log(7))


Z = np.ones((3, 4), np.float32)
MISTAKES = {
    "a list for an array": (
        lambda m: aria_jax.contrastive_loss(Z.tolist(), Z),
        "array .pairs, wid",
    ),
    "one axis": (lambda m: aria_jax.contrastive_loss(Z, Z[0]), r"second view .* not \[4\]"),
    "other pairs": (lambda m: aria_jax.contrastive_loss(Z, Z[:2]), r"\[3, 4\] and \[2, 4\]"),
    "temperature": (lambda m: aria_jax.contrastive_loss(Z, Z, temperature=0), "above 0"),
    "composition": (
        lambda m: aria_jax.contrastive_loss(Z, Z, composition=np.arange(2)),
        r"integers \[3\]",
    ),
    "logits for hidden": (
        lambda m: aria_jax.next_token_loss(Z, Z, Z),
        r"hidden is expected as an array \[B, L, d_model\]",
    ),
    "a path for a performance": (
        lambda m: aria_jax.write_midi("a.mid", "b.mid"),
        "a Performance.* not a str; `read_midi` reads a file",
    ),
    "a path to encode": (
        lambda m: aria_jax.Tokenizer.preset("aria").encode("a.mid"),
        "a Performance is expected",
    ),
    "ids that are words": (lambda m: aria_jax.detokenise(["a"]), "expected token ids"),
    "ids in two axes": (
        lambda m: aria_jax.detokenise([[1, 2]]),
        r"integers \[L\], not int64",
    ),
    "a number for a file": (lambda m: aria_jax.tokenise(3), "not an int"),
    "a missing file": (lambda m: aria_jax.tokenise("none.mid"), r"none\.mid: no such file"),
    "no checkpoint": (lambda m: aria_jax.load("none"), "none"),
    "a model for a path": (lambda m: aria_jax.load(aria_jax.load(m["lm"])), "expected the path"),
    "the model second": (
        lambda m: aria_jax.embed(read_midi, m["encoder"]),
        "as the first argument is expected",
    ),
    "another head": (lambda m: aria_jax.embed(m["lm"], "a.mid"), "embedding head"),
    "a set of files": (lambda m: aria_jax.embed(m["encoder"], {"a.mid"}), "not a set"),
    "generating with an encoder": (
        lambda m: aria_jax.generate(m["encoder"], random_performance(np.random.default_rng(0), 9)),
        "language",
    ),
    "an unknown task": (lambda m: aria_jax.train("pretrian", "d", "w"), "expected a task of pre"),
    "an unknown setting": (lambda m: aria_jax.train("pretrain", "d", "w", stesp=3), "steps"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors_say_what_was_expected(name, tiny_models):
    mistake, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        mistake(tiny_models)


def test_a_training_that_cannot_begin_leaves_no_folder(midi_corpus, tmp_path):
    with pytest.raises(UserError, match="no token shards here"):
        aria_jax.train("pretrain", midi_corpus, tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


def test_music_that_the_context_cannot_hold_is_said(tiny_models):
    prompt = random_performance(np.random.default_rng(1), 160)
    ask = {"seconds": 900, "max_tokens": 200}
    with pytest.warns(UserWarning, match="of the 512 tokens .* of 200 tokens follow"):
        aria_jax.generate(tiny_models["lm"], prompt, **ask)
