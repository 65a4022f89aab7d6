"""JAX's splash attention, a flash attention for TPUs (arXiv 2205.14135), on any mesh; elsewhere it is interpreted."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.errors import LuthierError
from luthier.parallel import Sharder

TILE, LARGEST_TILE = 128, 512  # tokens: a TPU's lanes, and what the kernel takes at once where it can


def multiple(sharder: Sharder) -> int:
    """What must divide a row's length."""
    return TILE * sharder.size("sequence")


def attend(q, k, v, mask, is_local, softcap, sharder: Sharder):
    """As `attention.attend`, causal within segments.

    On a mesh each device runs the kernel on its rows and heads; where time is split, on its queries
    and everybody's keys and values.
    """
    if q.shape[1] % multiple(sharder):
        raise LuthierError(
            f"attention='splash' needs a sequence length that {multiple(sharder)} divides, not {q.shape[1]}",
            where="stage.sequence_length",
            mend="Use model.attention='auto' or 'xla', or another length",
        )
    tensor = sharder.size("tensor")
    if k.shape[2] % tensor:  # replicated: as many copies as there are parts
        k, v = (jnp.repeat(x, tensor // k.shape[2], axis=2) for x in (k, v))
    run = functools.partial(_run, softcap=softcap, sharder=sharder)
    arguments = (*(x.swapaxes(1, 2) for x in (q, k, v)), mask.query_segments, mask.key_segments)
    if mask.window is None:
        out = run(None, *arguments)
    else:
        out = jax.lax.cond(is_local, functools.partial(run, mask.window), functools.partial(run, None), *arguments)
    return out.swapaxes(1, 2)


def _run(window, q, k, v, query_segments, key_segments, *, softcap, sharder: Sharder):
    """The kernel over `[B, H, T, D]`, made for this length, window and mesh."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    parts, length = sharder.size("sequence"), q.shape[2]
    shape = (length, length)
    one = masks.CausalMask(shape, shard_count=parts)
    if window is not None:
        one = masks.LocalMask(shape, (window - 1, 0), 0, shard_count=parts)
    rows, columns = math.gcd(length // parts, LARGEST_TILE), math.gcd(length, LARGEST_TILE)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([one] * (q.shape[1] // sharder.size("tensor"))),
        block_sizes=kernels.BlockSizes(
            **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), rows),
            **dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dq"), columns),
            **dict.fromkeys(("block_kv_dkv", "block_kv_dkv_compute"), columns),
        ),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="saved",
        head_shards=1,
        q_seq_shards=parts,
        interpret=sharder.device().platform != "tpu",
    )

    def run(kernel, q, k, v, query_segments, key_segments):
        call = lambda q, k, v, ours, theirs: kernel(q, k, v, segment_ids=kernels.SegmentIds(ours, theirs))  # noqa: E731
        return jax.vmap(call)(q, k, v, query_segments, key_segments)

    if sharder.mesh is None:
        return run(kernel, q, k, v, query_segments, key_segments)
    rows, heads, time, _ = sharder.spec(("batch", "heads", "time", None), q.shape)
    specs = kernel.manual_sharding_spec(NamedSharding(sharder.mesh, P(None, time)))
    return jax.shard_map(
        run,
        mesh=sharder.mesh,
        in_specs=(specs, P(rows, heads, time), P(rows, heads), P(rows, heads), P(rows, time), P(rows)),
        out_specs=P(rows, heads, time),
        check_vma=False,
    )(kernel, q, k, v, query_segments, key_segments)
