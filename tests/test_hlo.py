# ruff: noqa: E501 (lines of HLO are long)
"""Collectives and operations against hand counts."""

import jax
import jax.numpy as jnp
import pytest

from luthier.training.flops import matmul_flops
from luthier.training.hlo import Collective, collectives

# A loop of 5 around a gather over fsdp and a permute; outside, an asynchronous sum over data and fsdp, printed twice.
PROGRAM = """HloModule jit_step, entry_computation_layout={...}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,4]{1,0:T(8,128)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %w = bf16[8,4]{1,0} parameter(0)
  %gathered = bf16[32,4]{1,0} fusion(%w), kind=kCustom, calls=%fused
  %moved = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %out = (s32[], bf16[8,4]) tuple(%i, %w)
}

%condition (t: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> f32[16] {
  %x = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body
  %start = f32[16]{0} all-reduce-start(%y), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %again = f32[16]{0} all-reduce(%y), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %scattered = f32[4]{0} reduce-scatter(%y), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
}
"""


def test_collectives_by_hand():
    found = collectives(PROGRAM, {"data": 2, "fsdp": 4, "tensor": 1})
    assert sorted(found, key=lambda one: one.kind) == [
        Collective("all-gather", "fsdp", 5, 5 * 32 * 4 * 2, 5 * 32 * 4 * 2 * 3 // 4),
        Collective("all-reduce", "data+fsdp", 1, 16 * 4, 2 * 16 * 4 * 7 // 8),
        Collective("collective-permute", "data", 5, 5 * 6 * 4, 5 * 6 * 4),
        Collective("reduce-scatter", "data+fsdp", 1, 16, 3 * 16),
    ]


def test_two_stages_of_a_sum_are_two():
    """The collectives of a shard_map share channel 1 and the name of their source; their groups differ."""
    line = '  %s{0} = f32[{1}]{{0}} reduce-scatter(%x), channel_id=1, replica_groups={2}, metadata={{op_name="sum"}}'
    stages = [line.format("1", 8, "{{0,2},{1,3}}"), line.format("2", 4, "{{0,1},{2,3}}")]
    text = "\n".join(["ENTRY %main (x: f32[16]) -> f32[4] {", *stages, "}"])
    (found,) = collectives(text, {"fsdp": 4})
    assert found == Collective("reduce-scatter", "fsdp", 2, 4 * (8 + 4), 4 * (8 + 4))


def matrices(*shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    "program, arguments, expected",
    [
        (lambda a, b: a @ b, matrices((3, 5), (5, 7)), 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), matrices((2, 3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (lambda a: jax.lax.fori_loop(0, 9, lambda _, x: x @ a, a), matrices((4, 4)), 9 * 2 * 4**3),
        (lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=6)[0], matrices((4, 4)), 6 * 2 * 4**3),
        (lambda a: jax.lax.cond(True, lambda x: x @ x @ x, lambda x: x @ x, a), matrices((4, 4)), 2 * 2 * 4**3),
        (jax.grad(lambda a: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x))(a))), matrices((4, 4)), 4 * 2 * 4**3),
    ],
    ids=["product", "batched", "fori_loop", "scan", "cond", "remat"],
)
def test_flops_by_hand(program, arguments, expected):
    assert matmul_flops(jax.jit(program).trace(*arguments).jaxpr) == expected
