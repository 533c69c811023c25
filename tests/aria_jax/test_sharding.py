"""Every layout of the mesh computes what one device computes."""

from dataclasses import dataclass

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from aria_jax import sharding
from aria_jax.config import ComputeConfig, MeshConfig, ModelConfig
from aria_jax.losses.cross_entropy import next_token_loss
from aria_jax.models import abstract_parameters, parameter_shardings
from aria_jax.models.heads import init_sharded, parameter_specs, split_model
from aria_jax.sharding import (
    LOGICAL_RULES,
    MESH_AXES,
    active_mesh,
    batch_sharding,
    constrain,
    divisible_spec,
    iterate_rows,
    local_rows,
    make_mesh,
    mirrored_shardings,
    named_sharding,
    put_rows,
)
from data_pipeline.errors import UserError
from data_pipeline.loaders import BatchStream

# 61 tokens divide by no mesh axis, like the real vocabulary.
CONFIG = ModelConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=61)


def loss_and_grads(mesh, **compute):
    model = init_sharded(CONFIG, ComputeConfig(**compute), jax.random.key(0), mesh)
    tokens = np.random.default_rng(0).integers(0, 61, (8, 33))
    segments = np.repeat(np.arange(4), 8)[None].repeat(8, 0)
    merge, params = split_model(model)
    inputs, targets, segments = (
        jax.device_put(t, batch_sharding(mesh)) for t in (tokens[:, :-1], tokens[:, 1:], segments)
    )

    @jax.jit
    def run(params):
        def loss(params):
            model = merge(params)
            hidden = model.hidden(inputs, segment_ids=segments)
            return next_token_loss(hidden, model.head[...], targets, targets >= 0)[0]

        return jax.value_and_grad(loss)(params)

    with jax.set_mesh(mesh):
        value, grads = run(params)
    return float(value), jax.tree.leaves(jax.tree.map(np.asarray, grads))


@pytest.fixture(scope="module")
def single():
    return loss_and_grads(make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(
    "axes",
    [
        (1, 1, 1, 2),
        (1, 2, 2, 1),
        (2, 2, 2, 1),
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in ((2, 1, 1, 1), (1, 1, 4, 1), (1, 8, 1, 1), (1, 2, 2, 2))
        ),
    ],
    ids=str,
)
def test_layouts_agree(single, axes):
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    value, grads = loss_and_grads(mesh)
    assert value == pytest.approx(single[0], rel=1e-5)  # reductions in another order
    for actual, desired in zip(grads, single[1], strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compute", [{"scan_layers": False}, {"remat": "full"}], ids=str)
def test_layouts_agree_however_layers_are_computed(single, compute):
    value, grads = loss_and_grads(make_mesh(MeshConfig(1, 2, 2, 2), jax.devices()[:8]), **compute)
    assert value == pytest.approx(single[0], rel=1e-5)
    for actual, desired in zip(grads, single[1], strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-6)


def test_parameters_are_sharded_by_the_table():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    model = init_sharded(CONFIG, ComputeConfig(), jax.random.key(0), mesh)
    qkv = model.backbone.blocks.qkv[...]
    assert qkv.sharding.shard_shape(qkv.shape) == (2, 32 // 4, 3, 32 // 2)


def test_a_sharded_start_is_the_unsharded_one():
    one, many = (
        init_sharded(CONFIG, ComputeConfig(), jax.random.key(0), make_mesh(MeshConfig(), devices))
        for devices in (jax.devices()[:1], jax.devices()[:8])
    )
    leaves = (jax.tree.leaves(nnx.state(model)) for model in (one, many))
    for actual, desired in zip(*leaves, strict=True):
        np.testing.assert_array_equal(actual, desired)


def test_optimiser_state_is_sharded_like_the_parameters():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    _, params = split_model(init_sharded(CONFIG, ComputeConfig(), jax.random.key(0), mesh))
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    shardings = parameter_shardings(parameter_specs(CONFIG), mesh)
    moments = mirrored_shardings(state, params, shardings, mesh)[0]
    expected = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    for tree in (moments.mu, moments.nu):
        assert jax.tree.map(lambda leaf: leaf.spec, tree) == expected
    assert moments.count.is_fully_replicated


def test_an_array_that_mirrors_no_parameter_is_an_error():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    specs = parameter_specs(CONFIG)
    params, shardings = abstract_parameters(specs, mesh), parameter_shardings(specs, mesh)
    # Adafactor keeps rows and columns of second moments, not their whole.
    state = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=8).init, params)
    with pytest.raises(ValueError, match="nothing says how it is sharded"):
        mirrored_shardings(state, params, shardings, mesh)


def test_user_mistakes_are_explained():
    with pytest.raises(UserError, match="do not multiply to the 8 devices"):
        make_mesh(MeshConfig(3, 1, 1), jax.devices()[:8])
    with pytest.raises(UserError, match="do not multiply to the 8 devices"):
        make_mesh(MeshConfig(-1, -1, 1), jax.devices()[:8])
    with pytest.raises(UserError, match="choose a divisor of 32"):
        mesh = make_mesh(MeshConfig(1, 3, 1), jax.devices()[:3])
        init_sharded(CONFIG, ComputeConfig(), jax.random.key(0), mesh)


def test_two_logical_axes_never_share_a_mesh_axis():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match="twice"):
        named_sharding(mesh, ("batch", "embed"))
    for rule in LOGICAL_RULES.values():
        assert set((rule,) if isinstance(rule, str) else rule or ()) <= set(MESH_AXES)


@pytest.mark.parametrize(
    "use", [batch_sharding, parameter_shardings, constrain], ids=lambda use: use.__name__
)
def test_a_foreign_mesh_is_an_error(use):
    foreign = jax.make_mesh((4, 2), ("data", "model"), devices=jax.devices()[:8])
    with jax.set_mesh(foreign), pytest.raises(ValueError, match="make_mesh"):
        if use is parameter_shardings:
            use(parameter_specs(CONFIG), foreign)
        elif use is batch_sharding:
            use(foreign)
        else:
            jax.jit(lambda x: use(x, "batch"))(np.ones(8))


def test_axes_that_are_not_automatic_are_an_error():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:8]).reshape(8, 1, 1, 1),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * 4,
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="use make_mesh"):
        active_mesh()


def test_an_unknown_logical_axis_is_an_error():
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    with pytest.raises(ValueError, match=r"unknown logical axes \['embedd'\]"):
        named_sharding(mesh, ("embedd",))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"unknown logical axes \['rows'\]"):
        constrain(np.ones(8), "rows")


def test_sizes_that_do_not_divide_stay_whole():
    mesh = make_mesh(MeshConfig(2, 2, 2, 1), jax.devices()[:8])
    assert divisible_spec(mesh, ("batch", "length", "heads"), (8, 5, 3)) == jax.P(
        ("data", "fsdp"), "sequence", None
    )
    assert divisible_spec(mesh, ("batch", "length", "heads"), (6, 5, 4)) == jax.P(
        None, "sequence", "tensor"
    )


def test_the_mesh_is_seen_where_cutting_is_still_to_do():
    mesh = make_mesh(MeshConfig(2, 1, 1, 1), jax.devices()[:2])
    seen = []

    def within(x):
        seen.append(active_mesh())
        return constrain(x, "batch")

    assert active_mesh() is None
    with jax.set_mesh(mesh):
        assert active_mesh() is not None
        jax.shard_map(within, in_specs=jax.P("data"), out_specs=jax.P("data"))(np.ones(2))
    assert seen == [None]


@dataclass(frozen=True)
class Chip:
    """A chip of a described TPU pod."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0


def slices(number):
    """2×2×1 chips each."""
    return [
        Chip(4 * s + 2 * y + x, s, (x, y, 0))
        for s in range(number)
        for y in range(2)
        for x in range(2)
    ]


def test_only_the_data_axis_crosses_slices():
    grid = sharding._device_grid((4, 2, 1, 1), slices(2))
    numbers = np.vectorize(lambda chip: chip.slice_index)(grid)
    assert grid.shape == (4, 2, 1, 1)
    assert np.all(numbers == numbers[:, :1, :1, :1])  # each model lies within one slice
    assert {chip.id for chip in grid.flat} == set(range(8))
    with pytest.raises(UserError, match="must divide by the 2 slices"):
        sharding._device_grid((1, 8, 1, 1), slices(2))


class Numbers:
    """Examples that are their own number; remembers which were made."""

    n_examples = 100

    def __init__(self):
        self.made = []

    def batch(self, epochs, indices):
        self.made += indices.tolist()
        return {"one": indices, "two": indices[:, None] * [1.0, 2.0]}


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 1, 4)])
def test_rows_are_put_where_the_sharding_says_and_made_once(sizes):
    sharding = batch_sharding(make_mesh(MeshConfig(*sizes)))
    stream = BatchStream(Numbers(), 8)
    batch = put_rows(stream, 3, sharding)
    assert stream.examples.made == list(range(24, 32))
    (ahead,) = [rows for rows, _ in zip(iterate_rows(stream, sharding, 3), "1", strict=False)]
    for found in (batch, ahead):
        assert found["one"].sharding == sharding
        np.testing.assert_array_equal(found["one"], np.arange(24, 32))
        np.testing.assert_array_equal(found["two"], np.arange(24, 32)[:, None] * [1, 2])


def test_a_process_makes_the_rows_of_its_own_devices(monkeypatch):
    """As several processes see it, whatever the order of devices on the mesh."""
    mesh = make_mesh(MeshConfig(2, 2, 2, 1))
    sharding = batch_sharding(mesh)

    def of(*devices):
        everywhere = sharding.devices_indices_map((8,))
        own = {device: everywhere[device] for device in devices}
        monkeypatch.setattr(
            type(sharding), "addressable_devices_indices_map", lambda self, shape: own
        )
        return local_rows(sharding, 8)

    grid = mesh.devices[..., 0]  # data, fsdp, tensor
    assert of(*grid[0].ravel()) == ((0, 4),)
    assert of(*grid[:, 1].ravel()) == ((2, 4), (6, 8))
    assert of(*grid[:, :, 0].ravel()) == ((0, 8),)
    assert of(grid[1, 1, 1]) == ((6, 8),)
    monkeypatch.setattr(
        type(sharding),
        "addressable_devices_indices_map",
        lambda self, shape: {
            d: self.devices_indices_map(shape)[d] for d in [*grid[0, 1], grid[1, 1, 0]]
        },
    )
    stream = BatchStream(Numbers(), 8)
    rows = stream.rows(1, *local_rows(sharding, 8))
    assert rows["one"].tolist() == [10, 11, 14, 15]


def test_a_batch_that_does_not_divide_names_the_axes():
    sharding = batch_sharding(make_mesh(MeshConfig(2, 2, 2, 1)))
    with pytest.raises(UserError, match=r"6 rows .* 4 devices \(mesh.data × mesh.fsdp\)"):
        put_rows(BatchStream(Numbers(), 6), 0, sharding)
