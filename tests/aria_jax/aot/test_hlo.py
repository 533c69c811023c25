"""Collectives are found, sized and counted once."""

from aria_jax.aot.hlo import collectives

TEXT = """\
  %ag = bf16[8,128]{1,0} all-gather(bf16[1,128]{1,0} %x), replica_groups={{0,1}}, dimensions={0}
  %rs = f32[4]{0} reduce-scatter(f32[32]{0} %y), dimensions={0}
  %st = (f32[16]{0}, f32[16]{0}) all-reduce-start(f32[16]{0} %z), to_apply=%add
  %dn = f32[16]{0} all-reduce-done((f32[16]{0}, f32[16]{0}) %st)
  ROOT %cp = u8[10]{0} collective-permute(u8[10]{0} %w), source_target_pairs={{0,1}}
  %not = f32[9]{0} fusion(f32[9]{0} %all-gather.3), calls=%all-reduce.1
"""


def test_each_kind_with_number_and_bytes():
    assert collectives(TEXT) == {
        "all-gather": (1, 8 * 128 * 2),
        "reduce-scatter": (1, 32 * 4),
        "all-reduce": (1, 16 * 4),
        "collective-permute": (1, 10),
    }
    assert collectives("") == {}
