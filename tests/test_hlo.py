# SPDX-License-Identifier: Apache-2.0
"""HLO text -> numbers: each spelling that XLA prints, and programs whose numbers are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import hlo, hlo_memory

MESH = {"data": 2, "fsdp": 4}
ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ROWS),
        ("replica_groups={}", (tuple(range(8)),)),
        ("replica_groups=[2,4]<=[8]", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", ROWS),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", COLUMNS),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", PAIRS),
        ("replica_groups=mesh['a'=1,'b'=8] {'a'}", tuple((i,) for i in range(8))),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ROWS),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", COLUMNS),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_every_spelling_of_the_groups_is_read(text, groups):
    assert hlo.replica_groups(f", channel_id=1, {text}, dimensions={{0}}", 8) == groups


def module(entry: str, *computations: str) -> hlo.Program:
    head = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
    add = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %s = f32[] add(%a, %b)\n}\n\n"
    main = "ENTRY %main (p: f32[]) -> f32[] {\n  %x = bf16[16,64]{1,0} parameter(0)\n"
    return hlo.parse("\n".join([head + add, *computations, f"{main}{entry}\n}}\n"]))


FSDP = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}"


@pytest.mark.parametrize(
    ("line", "op", "wire"),
    [  # x has 2,048 bytes
        (f"%g = bf16[64,64]{{1,0}} all-gather(%x), {FSDP}, dimensions={{0}}", "all-gather", 6144),
        (f"%r = bf16[4,64]{{1,0}} reduce-scatter(%x), {FSDP}", "reduce-scatter", 1536),
        (f"%r = bf16[16,64]{{1,0}} all-reduce(%x), {FSDP}, to_apply=%add", "all-reduce", 3072),
        (f"%t = bf16[16,64]{{1,0}} all-to-all(%x), {FSDP}", "all-to-all", 1536),
        (
            "%c = bf16[16,64]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            2048,
        ),
    ],
)
def test_wire_bytes_are_those_of_a_ring(line, op, wire):
    (found,) = hlo.collectives(module("  " + line))
    assert (found.op, found.dtype, found.wire) == (op, "bf16", wire)
    assert found.axes(MESH) == "fsdp"


def test_an_asynchronous_pair_is_counted_once():
    pair = (
        f"  %s = (bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) all-gather-start(%x), {FSDP}\n"
        "  %d = bf16[64,64]{1,0} all-gather-done(%s)"
    )
    (found,) = hlo.collectives(module(pair))
    assert (found.op, found.payload, found.count) == ("all-gather", 8192, 1)


def test_a_collective_in_an_asynchronous_call_is_counted_once():
    inner = (
        "%wrapped (p: bf16[16,64]) -> bf16[4,64] {\n  %p = bf16[16,64]{1,0} parameter(0)\n"
        f"  ROOT %r = bf16[4,64]{{1,0}} reduce-scatter(%p), {FSDP}, to_apply=%add\n}}\n"
    )
    entry = (
        "  %s = ((bf16[16,64]), bf16[4,64], u32[]) async-start(%x), calls=%wrapped\n"
        "  %u = ((bf16[16,64]), bf16[4,64], u32[]) async-update(%s), calls=%wrapped\n"
        "  %d = bf16[4,64]{1,0} async-done(%u), calls=%wrapped"
    )
    (found,) = hlo.collectives(module(entry, inner))
    assert (found.op, found.count) == ("reduce-scatter", 1)


@pytest.mark.parametrize(
    ("kind", "op", "wire"),
    [("ALL_REDUCE", "all-reduce", 2048), ("ALL_GATHER", "all-gather", 2048)]
    + [("ONE_TO_ONE", "collective-permute", 2048)],
)
def test_a_transfer_between_slices_is_a_collective(kind, op, wire):
    marks = f'_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"'
    lines = (
        f"  %s = (bf16[16,64], u32[], token[]) send(%x, %t), frontend_attributes={{{marks}}}\n"
        f"  %r = (bf16[16,64], u32[], token[]) recv(%t), frontend_attributes={{{marks}}}\n"
        "  %d = token[] send-done(%s), is_host_transfer=true"
    )
    (found,) = hlo.collectives(module(lines))
    assert (found.op, found.wire) == (op, wire)
    assert found.groups == tuple((i, i + 8) for i in range(8))  # the program is of one slice
    assert found.axes({"data": 2, "fsdp": 8}) == "data"


def test_collectives_of_one_channel_are_told_apart():
    lines = [f"  %g{i} = bf16[64,64]{{1,0}} all-gather(%x), {FSDP}" for i in range(3)]
    assert len(hlo.collectives(module("\n".join(lines)))) == 3


def test_a_cpu_that_imitates_others_sends_bfloat16_as_float32():
    inner = (
        "%widen (p: bf16[16,64]) -> f32[16,64] {\n  %p = bf16[16,64]{1,0} parameter(0)\n"
        "  %c = f32[16,64]{1,0} convert(%p)\n  ROOT %b = f32[16,64]{1,0} bitcast(%c)\n}\n"
    )
    promoted = "to_apply=%add_promoted, metadata={}"
    entry = (
        "  %f = f32[16,64]{1,0} fusion(%x), kind=kLoop, calls=%widen\n"
        f"  %g = f32[64,64]{{1,0}} all-gather(%f), {FSDP}, dimensions={{0}}\n"
        f"  %r = f32[4,64]{{1,0}} reduce-scatter(%f), {FSDP}, {promoted}\n"
        f"  %a = f32[16,64]{{1,0}} all-reduce(%f), {FSDP}, to_apply=%add, metadata={{}}"
    )
    program = module(entry, inner)
    dtypes = [[one.dtype for one in hlo.collectives(program, imitated=yes)] for yes in (0, 1)]
    assert dtypes == [["f32"] * 3, ["bf16", "bf16", "f32"]]  # the last one is meant to be float32
    assert [one.payload for one in hlo.collectives(program, imitated=True)] == [8192, 2048, 4096]


def test_a_group_of_one_device_sends_nothing():
    line = "  %g = bf16[16,64]{1,0} all-gather(%x), replica_groups=[8,1]<=[8], dimensions={0}"
    assert hlo.collectives(module(line)) == []


@pytest.mark.parametrize(
    "name", ["%all-reduce-scatter (p: bf16[16,64])", "%fused (p: bf16[16,64])"]
)
def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter(name):
    inner = (
        f"{name} -> bf16[4,64] {{\n  %p = bf16[16,64]{{1,0}} parameter(0)\n"
        f"  %r = bf16[16,64]{{1,0}} all-reduce(%p), {FSDP}, to_apply=%add\n"
        "  ROOT %d = bf16[4,64]{1,0} dynamic-slice(%r), dynamic_slice_sizes={4,64}\n}\n"
    )
    entry = f"  %f = bf16[4,64]{{1,0}} fusion(%x), kind=kCustom, calls={name.split()[0]}"
    (found,) = hlo.collectives(module(entry, inner))
    assert (found.op, found.wire) == ("reduce-scatter", 1536)


def test_the_copies_of_a_collective_in_asynchronous_fusions_are_one():
    line = f"bf16[64,64]{{1,0}} all-gather(%p), {FSDP}, dimensions={{0}}"
    inner = [
        f"%f{i} (p: bf16[16,64]) -> bf16[64,64] {{\n  %p = bf16[16,64]{{1,0}} parameter(0)\n"
        f"  ROOT %g{i} = {line}\n}}\n"
        for i in range(3)
    ]
    entry = [f"  %c{i} = bf16[64,64]{{1,0}} fusion(%x), calls=%f{i}" for i in range(3)]
    (found,) = hlo.collectives(module("\n".join(entry), *inner))
    assert (found.payload, found.count) == (8192, 1)


def test_the_start_of_an_asynchronous_fusion_and_the_rest_of_it_are_one():
    """As libtpu 0.0.52 wrote two gathers in a layer for v5e, shortened."""
    shape, starts = "bf16[64,64]{1,0:T(8,128)(2,1)}", 'custom_call_target="AsyncCollectiveStart"'
    inner, entry = [], []
    for chain, channel in enumerate((30, 33)):
        for i, flags in enumerate(('"flag_end":"-1"', '"flag_end":"8"', '"flag_end":"8"')):
            name = f"{chain}.{i}"
            options = (
                f"channel_id={channel}, {FSDP[14:]}, dimensions={{0}}, use_global_device_ids=true, "
                f'frontend_attributes={{chain_id="{chain}"}}, '
                'metadata={op_name="jit(step)/gather" stack_frame_id=878}, '
                f'backend_config={{"async_collective_fusion_config":{{{flags}}}}}'
            )
            root = f"(bf16[16,64], {shape}, u32[]) custom-call(%g{name}), {starts}"
            root = root if i == 0 else f"{shape} copy(%g{name})"
            inner.append(
                f"%f{name} (p: bf16[16,64]) -> bf16[64,64] {{\n"
                "  %p = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)\n"
                f"  %g{name} = {shape} all-gather(%p), {options}\n  ROOT %r{name} = {root}\n}}\n"
            )
            entry.append(f"  %c{name} = {shape} fusion(%x), kind=kCustom, calls=%f{name}")
    found = hlo.collectives(module("\n".join(entry), *inner))
    assert [(one.op, one.payload, one.count) for one in found] == [("all-gather", 8192, 1)] * 2


LOOP = (
    "%body (t: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {\n"
    "  %t = (s32[], bf16[16,64]{1,0}) parameter(0)\n"
    "  %y = bf16[16,64]{1,0} get-tuple-element(%t), index=1\n"
    '  %k = bf16[16,64]{1,0} custom-call(%y), backend_config="a kernel\n}\nof several lines"\n'
    f"  %r = bf16[16,64]{{1,0}} all-reduce(%k), {FSDP}, to_apply=%add\n"
    "  ROOT %o = (s32[], bf16[16,64]{1,0}) tuple(%i, %r)\n}\n"
)
CONDITION = (
    "%cond (t: (s32[], bf16[16,64])) -> pred[] {\n"
    "  %t = (s32[], bf16[16,64]{1,0}) parameter(0)\n"
    "  %i = s32[] get-tuple-element(%t), index=0\n  %n = s32[] constant(6)\n"
    "  ROOT %less = pred[] compare(%i, %n), direction=LT\n}\n"
)


@pytest.mark.parametrize(
    ("extra", "count"), [('backend_config={"known_trip_count":{"n":"4"}}', 4), ("", 6)]
)
def test_a_collective_in_a_loop_counts_as_often_as_it_runs(extra, count):
    entry = (
        "  %z = (s32[], bf16[16,64]{1,0}) tuple(%c, %x)\n"
        f"  %w = (s32[], bf16[16,64]{{1,0}}) while(%z), condition=%cond, body=%body, {extra}"
    )
    (found,) = hlo.collectives(module(entry, LOOP, CONDITION))
    assert (found.count, found.wire) == (count, 3072 * count)


def test_bytes_follow_the_dtype_and_the_parts_of_a_tuple():
    assert hlo.nbytes("(f32[4,2]{1,0:T(8,128)}, bf16[3], pred[5], s4[6], u32[])") == 32 + 6 + 5 + 7
    assert hlo.nbytes("(f32[4]{0:T(128)S(1)}, f32[2]{0})", on_chip=False) == 8


def test_only_the_slice_of_a_tensor_is_traffic():
    inner = (
        "%fused (a: f32[100,64], b: s32[]) -> f32[1,64] {\n"
        "  %a = f32[100,64]{1,0} parameter(0)\n  %b = s32[] parameter(1)\n"
        "  ROOT %d = f32[1,64]{1,0} dynamic-slice(%a, %b), dynamic_slice_sizes={1,64}\n}\n"
    )
    entry = (
        "  %w = f32[100,64]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  %f = f32[1,64]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused\n"
        "  %n = f32[1,64]{1,0} negate(%f)"
    )
    assert hlo_memory.traffic(module(entry, inner)) == (256 + 4 + 256) + (256 + 256)


def test_the_buffers_at_the_peak_are_summed_by_scope():
    entry = "\n".join(
        f'  %b{i} = f32[{n}]{{0}} custom-call(%x), metadata={{op_name="jit(step)/{name}/dot"}}'
        for i, (n, name) in enumerate(
            [(100, "transpose(jvp(mlp))"), (50, "jvp(mlp)"), (200, "optimizer"), (60, "jvp(mlp)")]
            + [(10, "later")]
        )
    )
    buffers = "allocation 0: size 1000, parameter 0:\n value: <1 x @0> (size=999,offset=0): f32[]\n"
    buffers += "allocation 1: size 1000, preallocated-temp:\n" + "".join(
        f" value: <{i} b{i} @0> (size={size},offset={offset}): f32[]\n"
        for i, size, offset in [(0, 400, 0), (1, 200, 400), (2, 800, 0), (3, 240, 400), (4, 40, 0)]
    )
    ranges = (
        "  BufferLiveRange:\n    x{}:0-99\n    b0{}:1-5\n    b1{}:2-4\n    b2{}:6-9\n    b3{}:5-5\n"
        "    b4{}:50-51\n"
    )
    found = hlo_memory.at_peak(buffers, ranges, module(entry))
    assert found == {"optimizer": 800}
    without = ranges.replace("    b2{}:6-9\n", "")
    found = hlo_memory.at_peak(buffers, without, module(entry))
    assert found == {"mlp, backward": 400, "mlp": 240}


def compiled(run, *args):
    return hlo.parse(jax.jit(run).lower(*args).compile().as_text())


def test_the_collectives_of_a_compiled_program_are_found():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spec = P("fsdp", None)

    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def run(x):  # [4, 64] on a device
        def body(x, _):
            whole = jax.lax.all_gather(x, "fsdp", tiled=True)
            part = jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True)
            return jax.lax.psum(part, "data") + jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

        return jax.lax.scan(body, x, length=3)[0]

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    program = compiled(run, x)
    found = {(one.op, one.axes(MESH)): one for one in hlo.collectives(program)}
    counts = {key: (one.count, one.wire) for key, one in found.items()}
    assert program.devices == 8
    assert counts == {
        ("all-gather", "fsdp"): (3, 3 * 4096 * 3 / 4),
        ("reduce-scatter", "fsdp"): (3, 3 * 4096 * 3 / 4),
        ("all-reduce", "data"): (3, 3 * 1024 * 2 * 1 / 2),
        ("collective-permute", "data"): (3, 3 * 1024),
    }


def test_what_a_loop_saves_for_the_backward_pass_is_found():
    def run(x, w):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(body, x, w)[0] ** 2)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((128, 64), (6, 64, 64))]
    program = compiled(jax.grad(run, argnums=1), *shapes)
    layers = 6 * 128 * 64 * 4  # the input of each layer
    assert layers <= hlo_memory.saved_activations(program) <= layers + 128 * 64 * 4 + 64


def test_what_passes_through_a_loop_unchanged_is_not_saved():
    tuple_type = "(bf16[16,64], f32[8,8], f32[9,9])"
    body = (
        f"%BODY (t: {tuple_type}) -> {tuple_type} {{\n  %t = {tuple_type} parameter(0)\n"
        "  %made = bf16[16,64]{1,0} custom-call(%t)\n"
        "  %same = f32[8,8]{1,0} get-tuple-element(%t), index=1\n"
        "  %swap = f32[9,9]{1,0} get-tuple-element(%t), index=0\n"
        f"  ROOT %o = {tuple_type} tuple(%made, %same, %swap)\n}}\n"
    )
    entry = (
        f"  %first = {tuple_type} while(%z), condition=%cond, body=%first_body\n"
        "  %a = bf16[16,64]{1,0} get-tuple-element(%first), index=0\n"
        "  %a2 = bf16[16,64]{1,0} copy(%a)\n"
        "  %b = f32[8,8]{1,0} get-tuple-element(%first), index=1\n"
        "  %c = f32[9,9]{1,0} get-tuple-element(%first), index=2\n"
        f"  %given = {tuple_type} tuple(%a2, %b, %c)\n"
        f"  %second = {tuple_type} while(%given), condition=%cond, body=%second_body"
    )
    reads = (
        f"%second_body (u: {tuple_type}) -> {tuple_type} {{\n  %u = {tuple_type} parameter(0)\n"
        "  %x = bf16[16,64]{1,0} get-tuple-element(%u), index=0\n"
        "  %y = f32[8,8]{1,0} get-tuple-element(%u), index=1\n"
        "  %w = f32[9,9]{1,0} get-tuple-element(%u), index=2\n"
        f"  ROOT %p = {tuple_type} tuple(%x, %y, %w)\n}}\n"
    )
    program = module(entry, body.replace("BODY", "first_body"), reads, CONDITION)
    assert hlo_memory.saved_activations(program) == 16 * 64 * 2 + 9 * 9 * 4
    # A loop that changes a tensor begins with it.
    changes = body.replace("BODY", "second_body")
    program = module(entry, body.replace("BODY", "first_body"), changes, CONDITION)
    assert hlo_memory.saved_activations(program) == 0
