"""A program's text is read as it runs: loops by their trip counts, slices by their size, products,
cuDNN's attention and Pallas kernels by their FLOPs, transfers beside kernels.
"""

import pytest

from aria_jax.aot import GpuTopology
from aria_jax.aot.gpu import LATENCY, LINK_SHARE, UNALIGNED, Kernel, Rates
from aria_jax.aot.hlo import Collective, Module, Shape, device_groups, parse_operation, shapes
from aria_jax.aot.programs import BACKWARD_ATTENTION
from aria_jax.aot.roofline import LAUNCH, roofline

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,64,128]{2,1,0})->f32[]}

%layer_of (stack: f32[4,64,128], at: s32[]) -> bf16[64,128] {
  %stack = f32[4,64,128]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64,128]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %flat = f32[64,128]{1,0} bitcast(%slice)
  ROOT %narrow = bf16[64,128]{1,0} convert(%flat)
}

%product (x: bf16[32,64], w: bf16[64,128]) -> bf16[32,128] {
  %x = bf16[32,64]{1,0} parameter(0)
  %w = bf16[64,128]{1,0} parameter(1)
  ROOT %dot.1 = bf16[32,128]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%keep (held: bf16[4,32,128], made: bf16[32,128], at: s32[]) -> bf16[4,32,128] {
  %held = bf16[4,32,128]{2,1,0} parameter(0)
  %made = bf16[32,128]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %one = bf16[1,32,128]{2,1,0} bitcast(%made)
  %zero.1 = s32[] constant(0)
  ROOT %put = bf16[4,32,128]{2,1,0} dynamic-update-slice(%held, %one, %at.1, %zero.1, %zero.1)
}

%body (p: (s32[], f32[4,64,128], bf16[32,64], bf16[4,32,128])) -> (s32[], f32[4,64,128]) {
  %p = (s32[], f32[4,64,128]{2,1,0}, bf16[32,64]{1,0}, /*index=3*/bf16[4,32,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w.all = f32[4,64,128]{2,1,0} get-tuple-element(%p), index=1
  %x.1 = bf16[32,64]{1,0} get-tuple-element(%p), index=2
  %kept = bf16[4,32,128]{2,1,0} get-tuple-element(%p), index=3
  %w.1 = bf16[64,128]{1,0} fusion(%w.all, %i), kind=kLoop, calls=%layer_of
  %gather = (bf16[32,64]{1,0}, bf16[256,64]{1,0}) all-gather-start(%x.1), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %y = bf16[32,128]{1,0} fusion(%x.1, %w.1), kind=kCustom, calls=%product, backend_config={"reification_cost":[{"exec_time_us":9,"name":""},{"end_to_end_cycles":0,"exec_time_us":1.5,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %gathered = bf16[256,64]{1,0} all-gather-done(%gather)
  %kept.1 = bf16[4,32,128]{2,1,0} fusion(%kept, %y, %i), kind=kLoop, calls=%keep
  ROOT %out = (s32[], f32[4,64,128]{2,1,0}, bf16[32,64]{1,0}, bf16[4,32,128]{2,1,0}) tuple(%i, %w.all, %x.1, %kept.1)
}

%again (q: (s32[], f32[4,64,128], bf16[32,64], bf16[4,32,128])) -> pred[] {
  %q = (s32[], f32[4,64,128]{2,1,0}, bf16[32,64]{1,0}, bf16[4,32,128]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(4)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[4,64,128], b: bf16[32,64]) -> f32[] {
  %a = f32[4,64,128]{2,1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  %c = bf16[4,32,128]{2,1,0} constant({...})
  %start = (s32[], f32[4,64,128]{2,1,0}, bf16[32,64]{1,0}, bf16[4,32,128]{2,1,0}) tuple(%a, %b, %c)
  ROOT %loop = (s32[], f32[4,64,128]{2,1,0}, bf16[32,64]{1,0}, bf16[4,32,128]{2,1,0}) while(%start), condition=%again, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""  # noqa: E501
ATTENTION = """\
ENTRY %main (q: bf16[2,1024,8,64]) -> bf16[2,8,1024,64] {
  %q = bf16[2,1024,8,64]{3,2,1,0} parameter(0)
  %f = (bf16[2,8,1024,64]{3,1,2,0}, f32[2,8,1024]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "1024", "1024"]}, "mask_type": "CAUSAL"}
  ROOT %b = (bf16[2,8,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "1024", "1024"]}, "mask_type": "CAUSAL"}
}
"""  # noqa: E501
CUBLAS = """\
ENTRY %main (x: bf16[4096,1024], w: bf16[512,1024], y: bf16[4096,512]) -> (bf16[4096,512], s8[4194304]) {
  %x = bf16[4096,1024]{1,0} parameter(0)
  %w = bf16[512,1024]{1,0} parameter(1)
  %y = bf16[4096,512]{1,0} parameter(2)
  ROOT %p = (bf16[4096,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w, %y), custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{0}: (2, {})}, backend_config={"gemm_backend_config":{"alpha_real":1,"beta":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"precision_config":{"operand_precision":["DEFAULT","DEFAULT"]}}}
}
"""  # noqa: E501
PALLAS = """\
ENTRY %main (x: bf16[256,512]) -> f32[256,512] {
  %x = bf16[256,512]{1,0} parameter(0)
  ROOT %k = f32[256,512]{1,0} custom-call(%x, %x), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 4 : i32, ir = "ML\\00name = ", name = "statistics_kernel"SAID}
}
"""  # noqa: E501
SAID = r', serialized_metadata = "{\22flops\22: \22989000000\22}"'


@pytest.fixture
def h100() -> Rates:
    return Rates.of("h100:8")


def test_loops_count_by_their_trips_and_slices_by_their_size(h100):
    found = roofline(TEXT, h100)
    assert found.flops == 4 * 2 * 32 * 128 * 64
    # One layer of the stack in float32 and as bfloat16; the product; what is kept, read and put.
    moved = 64 * 128 * (4 + 2) + 2 * (32 * 64 + 64 * 128 + 32 * 128) + 2 * 2 * 32 * 128
    index = 4 + 4
    assert found.bytes == 4 * (moved + index)
    assert found.launches == 4 * 3 and found.unknown_loops == []
    assert found.xla_seconds == pytest.approx(4 * 1.5e-6)
    assert found.collectives == {"all-gather": (4, 4 * 256 * 64 * 2)}
    assert found.links == {"NVLink": 4 * 256 * 64 * 2}
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def test_a_loop_of_unknown_length_is_named(h100):
    found = roofline(TEXT.replace('{"known_trip_count":{"n":"4"}}', "{}"), h100)
    assert found.flops == 2 * 32 * 128 * 64 and found.unknown_loops == ["loop"]


def test_a_transfer_costs_what_kernels_beside_it_do_not_hide(h100):
    found = roofline(TEXT, h100)
    transfer = LATENCY["NVLink"] + 7 / 8 * 256 * 64 * 2 / (450e9 * LINK_SHARE)
    beside = found.parts["products"] / 4 + LAUNCH
    assert found.parts["collectives"] == pytest.approx(4 * (transfer - beside))
    at_once = TEXT.replace("all-gather-start(", "all-gather(").replace(
        "(bf16[32,64]{1,0}, bf16[256,64]{1,0}) all-gather(", "bf16[256,64]{1,0} all-gather("
    )
    at_once = at_once.replace("all-gather-done(%gather)", "bitcast(%gather)")
    assert roofline(at_once, h100).parts["collectives"] == pytest.approx(4 * transfer)


def test_attention_counts_the_scores_that_are_seen(h100):
    found = roofline(ATTENTION, h100)
    forward = 4 * 2 * 8 * 1024 * 1024 * 64 / 2
    assert found.attention_flops == forward * (1 + BACKWARD_ATTENTION)
    seconds = forward * (1 / 0.38 + BACKWARD_ATTENTION / 0.40) / 989e12
    assert found.parts["attention"] == pytest.approx(seconds)
    whole = roofline(ATTENTION.replace("CAUSAL", "NO_MASK"), h100)
    assert whole.attention_flops == 2 * found.attention_flops


def test_products_of_cublas_count_with_what_they_add_and_without_their_working_space(h100):
    found = roofline(CUBLAS, h100)
    assert found.flops == 2 * 4096 * 512 * 1024
    assert found.bytes == 2 * (4096 * 1024 + 512 * 1024 + 2 * 4096 * 512)
    assert found.parts["products"] > 0 and found.parts["memory"] == 0
    exact = CUBLAS.replace("bf16", "f32").replace("DEFAULT", "HIGHEST")
    assert roofline(exact, h100).parts["products"] > 8 * found.parts["products"]


def test_pallas_kernels_say_their_flops_or_are_named(h100):
    silent = roofline(PALLAS.replace("SAID", ""), h100)
    assert silent.uncounted == ["statistics_kernel"] and silent.kernel_flops == 0
    said = roofline(PALLAS.replace("SAID", SAID), h100)
    assert said.uncounted == [] and said.kernel_flops == 989e6
    slow = Kernel("statistics_kernel", 255, 0, 0, 0, 0, {})
    without = roofline(PALLAS.replace("SAID", SAID), h100, (slow,))
    assert without.parts["kernels"] > 5 * said.parts["kernels"]


def test_unaligned_rows_and_too_few_tiles_cost(h100):
    aligned = roofline(DOT.format(rows=65_536, columns=4096), h100)
    odd = roofline(DOT.format(rows=65_536, columns=4095), h100)
    assert odd.parts["products"] == pytest.approx(UNALIGNED * aligned.parts["products"], rel=1e-3)
    few = roofline(DOT.format(rows=128, columns=4096), h100)
    assert few.parts["products"] > 3 * aligned.parts["products"] / 512


DOT = """\
ENTRY %main (x: bf16[{rows},1024], w: bf16[1024,{columns}]) -> bf16[{rows},{columns}] {{
  %x = bf16[{rows},1024]{{1,0}} parameter(0)
  %w = bf16[1024,{columns}]{{1,0}} parameter(1)
  ROOT %d = bf16[{rows},{columns}]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}
}}
"""


def test_groups_in_every_way_of_writing_them():
    assert device_groups("replica_groups={{0,2},{1,3}}, x") == ((0, 2), (1, 3))
    assert device_groups("replica_groups=[2,4]<=[8], x") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert device_groups("replica_groups=[4,2]<=[2,4]T(1,0)") == ((0, 4), (1, 5), (2, 6), (3, 7))
    mesh = "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x"
    assert device_groups(mesh) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert device_groups("channel_id=1") == ()


def test_groups_that_leave_a_host_go_over_the_network():
    rates = Rates.of("2x h100:8")
    assert rates.topology == GpuTopology("h100", 2, 8)
    inside = Collective("all-gather", 10**9, (tuple(range(8)), tuple(range(8, 16))))
    across = Collective("all-reduce", 10**9, ((0, 8), (1, 9)))
    assert (rates.link(inside), rates.link(across)) == ("NVLink", "network")
    # One adapter of 50 GB/s for each of the pair; a sum is sent twice.
    seconds = LATENCY["network"] + 2 * 0.5 * 1e9 / (50e9 * LINK_SHARE)
    assert rates.collective_seconds(across) == pytest.approx(seconds)
    # Groups that the text does not name are all devices.
    assert rates.link(Collective("all-reduce", 8, ())) == "network"


def test_types_and_operands_are_parsed():
    found = shapes("(bf16[8,128]{1,0:T(8,128)}, f32[], /*index=2*/pred[3]{0}, f8e4m3fn[2,4]{0,1})")
    assert [shape.bytes for shape in found] == [2048, 4, 3, 8]
    assert found[0] == Shape("bf16", (8, 128), 1) and found[0].aligned and not found[3].aligned
    line = "  ROOT %f.1 = f32[2]{0} fusion(f32[2]{0} %a, /*index=1*/%b.2), calls=%c, x={(1)}"
    operation = parse_operation(line)
    assert operation.operands == ("a", "b.2") and operation.called == "c" and operation.root
    assert parse_operation("}") is None
    assert Module.parse(TEXT).entry == "main"
