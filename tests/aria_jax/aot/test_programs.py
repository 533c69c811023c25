"""Programs of shapes are those that run: here they compile for a mesh of CPUs, without arrays;
and what the text of a compiled program says is found, sized and counted once.
"""

import jax
import pytest

from aria_jax.aot.programs import collectives, cycles, kernel_flops, moved_bytes, program
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


TEXT = """\
  %ag = bf16[8,128]{1,0} all-gather(bf16[1,128]{1,0} %x), replica_groups={{0,1}}, dimensions={0}
  %rs = f32[4]{0} reduce-scatter(f32[32]{0} %y), dimensions={0}
  %st = f32[16]{0} all-reduce-start(f32[16]{0} %z), to_apply=%add
  %dn = f32[16]{0} all-reduce-done(f32[16]{0} %st)
  %gs = (bf16[1,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%x), dimensions={0}
  %tu = (f32[4]{0:T(128)}, f32[]{:T(128)}) all-reduce(%p, %q), to_apply=%add
  ROOT %cp = u8[10]{0} collective-permute(u8[10]{0} %w), source_target_pairs={{0,1}}
  %ps = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%v)
  %not = f32[9]{0} fusion(f32[9]{0} %all-gather.3), calls=%all-reduce.1
"""


def test_each_kind_with_number_and_bytes():
    assert collectives(TEXT) == {
        "all-gather": (2, 2 * 8 * 128 * 2),
        "reduce-scatter": (1, 32 * 4),
        "all-reduce": (2, 16 * 4 + 4 * 4 + 4),
        "collective-permute": (2, 10 + 8 * 4),
    }
    assert collectives("") == {}


def test_sums_move_twice():
    assert moved_bytes({"all-gather": (1, 10), "all-reduce": (2, 20)}) == 50


def test_cycles_but_of_operations_without_an_estimate():
    config = 'fusion(), backend_config={"window_config":{"estimated_cycles":"%d"}}\n'
    assert cycles("".join(config % n for n in (1200, 2**63 - 1, 34))) == 1234
    assert cycles("") == 0


def test_estimates_that_kernels_bring():
    call = 'custom-call(), backend_config={"cost_estimate":{"bytes_accessed":"7","flops":"%d"}}\n'
    assert kernel_flops(call % 5 + call % 6) == 11
