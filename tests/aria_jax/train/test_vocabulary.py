"""A vocabulary closed to what the corpus can hold: exact, small, and the same to every reader."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import load_file

from aria_jax.checkpoints import check_model, model_digest
from aria_jax.checkpoints.models import load_model
from aria_jax.checkpoints.safetensors import export_model, import_model
from aria_jax.config import ComputeConfig, ModelConfig, RunConfig, with_overrides
from aria_jax.generate.decoding import Decoding, decode
from aria_jax.generate.sampler import Temperature
from aria_jax.generate.score import score_pieces
from aria_jax.generate.weights import decoder_weights
from aria_jax.models.heads import build_model, row_table, split_model, with_vocabulary
from aria_jax.presets import for_task
from aria_jax.train.loop import run
from aria_jax.train.objectives import loss_function
from aria_jax.train.tasks import resolve
from data_pipeline.augment import augment
from data_pipeline.errors import UserError
from data_pipeline.settings import AugmentConfig
from data_pipeline.shards import TokenShards
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import ids_in, ranges_of

ARIA = Tokenizer.preset("aria")
CLOSED, ALL_IDS = "model.vocabulary=corpus", "model.vocabulary="
ORGAN = ARIA.id_of(("organ", 60, 60))


@pytest.fixture(scope="module")
def closed_run(config, corpus, tmp_path_factory):
    """The workdir of a run of four steps with a closed vocabulary."""
    workdir, devices = tmp_path_factory.mktemp("closed"), jax.devices()
    with pytest.MonkeyPatch.context() as patch:  # the fixture `one_device` comes later
        patch.setattr("aria_jax.sharding.jax.devices", lambda: devices[:1])
        run(config("pretrain", CLOSED), corpus, workdir)
    return workdir


def test_ranges_are_ids_and_back():
    ids = np.array([0, 1, 2, 5, 7, 8])
    assert ranges_of(ids) == ("0-2", "5", "7-8")
    assert ids_in(ranges_of(ids)) == ids.tolist()
    assert ids_in(("0-2", "x")) == []


@pytest.mark.parametrize("text", ["5-3", "0-20000", "1,0", "a-b", "0-3,2-5"])
def test_a_vocabulary_that_cannot_be_read_is_refused(config, text):
    with pytest.raises(UserError, match="corpus or ranges"):
        config("pretrain", f"model.vocabulary={text}").validate()


def test_no_augmentation_leaves_the_vocabulary(config, corpus):
    model = resolve(config("pretrain", CLOSED), corpus).model
    _, known_V = row_table(model)
    assert 2_500 < model.n_rows == known_V.sum() < 2_700  # of 17,727
    rng = np.random.default_rng(0)
    wild = AugmentConfig(
        tempo=0.9, pitch=60, velocity=12, rubato=0.9, velocity_curve=12, sustain=0.9, note_drop=0.5
    )
    shards = TokenShards(corpus, "train")
    for i in range(len(shards)):
        for settings in (AugmentConfig(), wild):
            assert known_V[augment(shards[i].ids, settings, rng, ARIA)].all()
    assert not known_V[ORGAN]


def test_loss_and_gradients_are_those_of_masked_logits(config, corpus):
    """Against the network with all rows, whose other ids are masked with -inf."""
    closed = resolve(config("pretrain", CLOSED), corpus)
    full = dataclasses.replace(closed, model=dataclasses.replace(closed.model, vocabulary=()))
    model = build_model(full.model, ComputeConfig(), rngs=nnx.Rngs(0))
    merge_full, params = split_model(model)
    small, n_new = with_vocabulary(params, full.model, closed.model)
    assert n_new == 0
    merge, _ = split_model(build_model(closed.model, ComputeConfig(), rngs=nnx.Rngs(1)))
    _, known_V = row_table(closed.model)
    pieces = TokenShards(corpus, "train")
    ids = np.stack([pieces[i].ids[:33] for i in range(23) if len(pieces[i].ids) >= 33][:4])
    batch = {"inputs": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:].astype(np.int32)}
    batch["loss_mask"] = np.ones((4, 32), bool)

    def masked(params):
        logits = jnp.where(known_V, merge_full(params)(batch["inputs"]), -jnp.inf)
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - chosen).mean()

    def actual(params):
        return loss_function(closed)(merge(params), batch, None)[0]

    expected, by_all_rows = jax.jit(jax.value_and_grad(masked))(params)
    found, grads = jax.jit(jax.value_and_grad(actual))(small)
    assert found == pytest.approx(float(expected), rel=1e-6)  # float32 sums in another order
    wanted, _ = with_vocabulary(by_all_rows, full.model, closed.model)

    def near(a, b):
        # A sum that cancels is as exact as its largest terms, which machines round differently.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())

    jax.tree.map(near, grads, wanted)
    for axis, grad in ((0, by_all_rows["backbone"]["embedding"]), (1, by_all_rows["head"])):
        assert not np.compress(~known_V, grad, axis).any()
    logits = merge(small)(batch["inputs"])
    assert logits.shape[-1] == ARIA.vocab_size and np.isneginf(logits[..., ~known_V]).all()


def test_the_published_layout_has_all_rows_and_the_compact_one_the_corpus(closed_run, tmp_path):
    loaded = load_model(closed_run)
    export_model(loaded.model, tmp_path / "all.safetensors")
    export_model(loaded.model, tmp_path / "few.safetensors", dtype="bfloat16", compact=True)
    _, known_V = row_table(loaded.config)
    for name in ("model.tok_embeddings.weight", "lm_head.weight"):
        table = np.asarray(load_file(tmp_path / "all.safetensors")[name])
        assert len(table) == 17_727 and not table[~known_V].any() and table[known_V].all(1).any()
        assert load_file(tmp_path / "few.safetensors")[name].shape[0] == loaded.config.n_rows
    params = split_model(loaded.model)[1]
    for name, rounded in (("all", lambda x: x), ("few", lambda x: x.astype(jnp.bfloat16))):
        back = import_model(tmp_path / f"{name}.safetensors")
        assert back.config == loaded.config
        jax.tree.map(
            lambda a, b, rounded=rounded: np.testing.assert_array_equal(rounded(a), b),
            params,
            split_model(back)[1],
        )


def test_nothing_else_is_drawn_scored_or_taken_as_a_prompt(closed_run):
    loaded = load_model(closed_run)
    prompt = np.array([ARIA.id_of(("prefix", "instrument", "piano")), ARIA.bos_id])
    _, known_V = row_table(loaded.config)

    def continuations(prompt):
        settings = Decoding(max_tokens=48, use_grammar=False, sampler=Temperature(temperature=2.0))
        weights, key = decoder_weights(loaded.model), jax.random.key(0)
        return decode(weights, ARIA, prompt, n_sequences=8, key=key, settings=settings)

    *_, ids = continuations(prompt)
    assert known_V[ids].all() and len(np.unique(ids)) > 100
    organ = np.append(prompt, ORGAN)
    with pytest.raises(UserError, match=r"no probability, such as .'organ', 60, 60"):
        next(continuations(organ))
    with pytest.raises(UserError, match="no probability"):
        score_pieces(loaded.model, ARIA, [organ])
    piece = np.append(prompt, ARIA.id_of(("piano", 60, 60)))
    (score,) = score_pieces(loaded.model, ARIA, [piece])
    logits = jax.nn.log_softmax(loaded.model(piece[None, :-1])[0])
    np.testing.assert_allclose(score.nll, -np.asarray(logits)[[0, 1], piece[1:]], rtol=1e-5)


@pytest.mark.slow
def test_resumes_and_serves_as_a_beginning(closed_run, config, corpus, tmp_path, weights):
    more = run(config("pretrain", CLOSED, "steps=6"), corpus, closed_run)
    assert (more.init.kind, more.final_step) == ("resume", 6)
    full = tmp_path / "full"
    with pytest.warns(UserWarning, match="15,180 of the 17,727 token ids"):
        run(config("pretrain", ALL_IDS, "steps=0"), corpus, full, init_from=closed_run)
    assert weights(full)["head"].shape == (32, 17_727)
    # From all rows to few, whole and as the base of adapters; and again from the disk.
    for name, settings in (("few", []), ("lora", ["lora_rank=2"])):
        few = tmp_path / name
        run(config("contrastive", CLOSED, "steps=0", *settings), corpus, few, init_from=full)
        found, _ = with_vocabulary(weights(full), load_model(full).config, load_model(few).config)
        np.testing.assert_array_equal(
            weights(few)["backbone"]["embedding"], found["backbone"]["embedding"]
        )
    resumed = run(config("contrastive", CLOSED, "steps=1", "lora_rank=2"), corpus, few)
    assert resumed.init.kind == "resume"


def test_an_ordered_start_puts_near_times_and_pitches_near_each_other(
    config, corpus, tmp_path, weights
):
    settings = config("pretrain", CLOSED, "steps=0")
    run(settings, corpus, tmp_path / "random")
    run(config("pretrain", CLOSED, "steps=0", "ordered_start=true"), corpus, tmp_path / "ordered")
    before, after = (weights(tmp_path / name) for name in ("random", "ordered"))
    row_V, known_V = row_table(resolve(settings, corpus).model)
    for old, new in (
        (before["backbone"]["embedding"], after["backbone"]["embedding"]),
        (before["head"].T, after["head"].T),
    ):
        assert new.std() == pytest.approx(old.std(), rel=0.1)
        special = known_V[:17] & (ARIA.kind[:17] < 3)
        np.testing.assert_array_equal(new[row_V[:17]][special], old[row_V[:17]][special])
        for table, near in ((old, False), (new, True)):
            unit = table / np.linalg.norm(table, axis=1, keepdims=True)

            def likeness(one, *others, unit=unit):
                return [unit[row_V[ARIA.id_of(one)]] @ unit[row_V[ARIA.id_of(o)]] for o in others]

            onset, *far = likeness(("onset", 2000), ("onset", 2010), ("onset", 4000), ("dur", 2010))
            assert (onset > 0.8 and onset > max(far) + 0.2) == near
            pitch, *far = likeness(("piano", 60, 60), ("piano", 60, 70), ("piano", 90, 20))
            assert (pitch > 0.3 and pitch > max(far) + 0.1) == near
    same = jax.tree.map(np.array_equal, before["backbone"]["blocks"], after["backbone"]["blocks"])
    assert all(jax.tree.leaves(same))


def test_a_file_of_weights_is_a_checkpoint_and_a_released_name_a_file(
    closed_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("aria_jax.checkpoints.RELEASED", tmp_path)
    with pytest.raises(UserError, match=r"mini: the weights .* not part of this installation"):
        load_model("mini")
    loaded = load_model(closed_run)
    about = {"tokenizer": "aria", "pooling": "mean", "reading": "aria-utils", "step": 4}
    about["slices"] = (127, 384)
    file = tmp_path / "mini.safetensors"
    export_model(loaded.model, file, dtype="bfloat16", compact=True, about=about)
    for source in (file, "mini"):
        check_model(source)
        found = load_model(source)
        assert (found.config, found.path) == (loaded.config, str(source))
        assert {name: getattr(found, name) for name in about} == about
    assert model_digest("mini") == model_digest(file)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    with pytest.raises(UserError, match="no checkpoint here"):
        check_model("mini")  # a folder of that name is the user's own


def test_ranges_that_lack_an_id_of_the_corpus_are_refused(config, corpus):
    with pytest.raises(UserError, match="tokens to which this model gives no probability"):
        resolve(config("pretrain", "model.vocabulary=0-100"), corpus)


@pytest.mark.parametrize("task", ["pretrain", "continue", "contrastive", "classify"])
def test_mini_is_closed_to_its_corpus_in_every_task(task, corpus):
    label = ["label=composer"] if task == "classify" else []
    found = resolve(with_overrides(for_task("mini", task), label), corpus)
    assert found.problems() == [] and 2_500 < found.model.n_rows < 2_700
    assert found.train.ordered_start == (task == "pretrain")


def test_before_the_data_is_known_all_ids_are_planned_for():
    assert ModelConfig(vocabulary=("corpus",)).n_rows == ModelConfig().vocab_size
    assert RunConfig(model=ModelConfig(vocabulary=("corpus",))).problems() == []
