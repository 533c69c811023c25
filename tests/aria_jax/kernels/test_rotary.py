"""Rotation of queries and keys, and the kernel that has it inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.config import MeshConfig
from aria_jax.kernels import attention as kernels
from aria_jax.kernels import packed_attention as packed
from aria_jax.kernels.attention import apply_rope, rope_tables, rotary_attention
from aria_jax.sharding import make_mesh


def case(batch, length, heads, width, segments=False, dtype=jnp.float32, own_positions=False):
    rng = np.random.default_rng(length + width)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, length, heads * width)), dtype) for _ in "qkv")
    ids, positions = None, jnp.arange(length)[None]
    if segments:
        cuts = np.sort(rng.integers(0, length, (batch, 3)), axis=1)
        ids = jnp.asarray((np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1), jnp.int32)
    if own_positions:
        positions = jnp.asarray(rng.integers(0, 100, (batch, 1))) + positions
    cos, sin = rope_tables(positions, width)
    return dict(q_BxLxD=q, k_BxLxD=k, v_BxLxD=v, cos=cos, sin=sin, segment_ids=ids, n_heads=heads)


def values_and_gradients(arguments, implementation):
    weights = jnp.cos(jnp.arange(arguments["q_BxLxD"].size)).reshape(arguments["q_BxLxD"].shape)
    names = ("q_BxLxD", "k_BxLxD", "v_BxLxD")

    def scalar(qkv):
        given = {**arguments, **dict(zip(names, qkv, strict=True))}
        out = rotary_attention(**given, implementation=implementation)
        return (out * weights).sum(), out

    qkv = tuple(arguments[name] for name in names)
    (_, out), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(qkv)
    return out, *grads


def check(arguments, tolerance=5e-5):
    found = values_and_gradients(arguments, "packed")
    for actual, desired in zip(found, values_and_gradients(arguments, "plain"), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)  # order of sums


@pytest.mark.parametrize(
    "length, tile, heads, segments",
    [
        (300, 128, 2, True),
        (512, 256, 2, False),
        pytest.param(256, 256, 4, True, marks=pytest.mark.slow),
    ],
)
def test_packed(monkeypatch, length, tile, heads, segments):
    monkeypatch.setattr(packed, "TILES", (tile,))
    monkeypatch.setattr(packed, "SUBTILE", 128)
    check(case(2, length, heads, 64, segments=segments))


@pytest.mark.parametrize("width", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_packed_with_heads_of_any_width_and_positions_of_its_own(width):
    check(case(2, 128, 256 // width, width, segments=True, own_positions=True))


def test_tables_of_known_positions_are_constants():
    positions = np.arange(512)[None]
    program = jax.make_jaxpr(lambda: rope_tables(positions, 64))()
    assert not program.eqns
    for known, traced in zip(
        rope_tables(positions, 64), rope_tables(jnp.asarray(positions), 64), strict=True
    ):
        # a last bit of a frequency, times the position
        np.testing.assert_allclose(known, traced, rtol=0, atol=512 * 2e-7)


def test_packed_in_bfloat16_sums_in_float32(monkeypatch):
    monkeypatch.setattr(packed, "TILES", (128,))  # eight sums in a row
    arguments = case(1, 1024, 2, 64, dtype=jnp.bfloat16)
    wide = {n: a.astype(jnp.float32) if n[0] in "qkv" else a for n, a in arguments.items()}
    wide_values = values_and_gradients(wide, "plain")
    for actual, desired in zip(values_and_gradients(arguments, "packed"), wide_values, strict=True):
        # bfloat16 has 8 bits: inputs, weights and outputs are rounded once each
        error = jnp.linalg.norm(actual.astype(jnp.float32) - desired) / jnp.linalg.norm(desired)
        assert error < 1e-2


def test_packed_cut_over_a_mesh():
    arguments = case(2, 128, 4, 64, segments=True)
    expected = values_and_gradients(arguments, "plain")
    mesh = make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = values_and_gradients(arguments, "packed")
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize(
    "length, columns, width, expected",
    [
        (8192, 1536, 64, True),
        (8192, 192, 64, False),  # three heads
        (8192, 1024, 128, False),  # one head a block: nothing to gain
        (8192, 1024, 8, False),
        (8192, 1536, 48, False),
        (64, 1536, 64, False),
        (32_768, 1536, 64, False),
    ],
)
def test_what_packed_suits(length, columns, width, expected):
    assert packed.suits(length, columns, width) == expected


def test_packed_refuses_what_it_does_not_suit():
    with pytest.raises(ValueError, match="do not suit"):
        values_and_gradients(case(1, 128, 1, 128), "packed")


@pytest.mark.parametrize(
    "heads, sizes, expected",
    [(4, (2, 1, 2, 1), "packed"), (4, (2, 1, 1, 2), "splash"), (3, (1, 1, 1, 1), "splash")],
)
def test_what_is_chosen_on_a_tpu(monkeypatch, heads, sizes, expected):
    """Packed on whole sequences and whole blocks of heads, splash otherwise."""
    chosen = []
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    monkeypatch.setattr(packed, "fits_chip", lambda: True)
    monkeypatch.setattr(kernels, "_packed", lambda q, *_: chosen.append("packed") or q)
    monkeypatch.setattr(packed, "splash_attend", lambda q, *_: chosen.append("splash") or q)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        rotary_attention(**case(2, 128, heads, 64))
    assert chosen == [expected]


@pytest.mark.parametrize("length, tile", [(128, 128), (300, 512), (1920, 512), (8192, 1024)])
def test_tiles_weigh_padding_against_steps(length, tile):
    assert packed.tile_of(length) == tile


def test_rotation_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in "qk")
    products = []
    for shift in (0, 5):
        cos, sin = rope_tables(jnp.array([[3 + shift, 7 + shift]]), 8)
        turned_q, turned_k = (apply_rope(x, cos[:, [i]], sin[:, [i]]) for i, x in enumerate((q, k)))
        products.append(float((turned_q * turned_k).sum()))
    assert products[0] == pytest.approx(products[1], rel=1e-5)
