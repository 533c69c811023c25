"""Programs of shapes are those that run: here they compile for a mesh of CPUs, without arrays."""

import jax
import pytest

from aria_jax.aot.programs import program
from aria_jax.config import MeshConfig, with_overrides
from aria_jax.presets import for_task
from aria_jax.sharding import make_mesh


@pytest.mark.parametrize("task", ["embed", "prefill", "decode"])
def test_programs_compile_for_a_mesh(task):
    config = for_task("tiny", "contrastive" if task == "embed" else "pretrain")
    settings = ["d_model=32", "n_heads=2", "n_layers=1", "seq_len=64", "global_batch=8"]
    config = with_overrides(config, settings)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    made = program(config, task, mesh)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(made.arguments))
    with jax.set_mesh(mesh):
        compiled = made.function.lower(*made.arguments).compile()
    out = jax.tree.leaves(compiled.out_info)[0]
    assert out.shape[0] == (1 if task == "prefill" else 8)
