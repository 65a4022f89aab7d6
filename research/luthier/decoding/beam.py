"""Beam search: the likeliest texts that a beam of K partial ones leads to, all on the device.

The rules are those of Hugging Face transformers (`num_beams=K, early_stopping=False`), so results can be
compared: of the (E + 1) K likeliest continuations, E end-of-text tokens, the K best that go on are kept;
those that end are finished if they are among the K best, and compete by log-probability / length^α. A row is
done when no partial text can beat its K finished ones.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from luthier.decoding.sampling import Sampling
from luthier.models import KVCache, init_cache
from luthier.models.apart import cache_apart
from luthier.tuners import Bound


@flax.struct.dataclass
class Texts:
    """K texts a row, ragged: `tokens`, `logprobs` `[B, K, N]`, `lengths` `[B, K]`.

    `scores` `[B, K]` are sums of log-probabilities of partial texts, or the scores of finished ones.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    scores: jax.Array


@flax.struct.dataclass
class Beams:
    """State of the search; the cache has B · K rows, `step` tokens are made."""

    cache: KVCache
    positions: jax.Array
    partial: Texts
    finished: Texts
    done: jax.Array
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("bound", "room", "apart", "sampling", "eos"))
def prefill(variables, batch, done, limit, *, bound: Bound, room: int, apart: bool, sampling: Sampling, eos) -> Beams:
    """Reads the prompts `[B, P]` once, and begins with the likeliest first tokens of each.

    Args:
      limit: tokens of a text at most, at most `room`.
    """
    (rows, length), beams = batch["tokens"].shape, sampling.beams
    cache = init_cache(bound.model.config, rows, length + room, bound.model.dtype)
    hidden, cache = bound.hidden(variables, batch, cache=cache)
    cache = cache_apart(cache) if apart else cache
    nothing = Texts(
        tokens=jnp.zeros((rows, beams, room), jnp.int32),
        logprobs=jnp.zeros((rows, beams, room), jnp.float32),
        lengths=jnp.zeros((rows, beams), jnp.int32),
        scores=jnp.full((rows, beams), -jnp.inf),
    )
    state = Beams(
        cache=_each_row(lambda x: jnp.repeat(x, beams, axis=0), cache),
        positions=jnp.repeat(batch["positions"][:, -1] + 1, beams),
        partial=nothing.replace(scores=nothing.scores.at[:, 0].set(0.0)),
        finished=nothing,
        done=done,
        step=jnp.int32(0),
    )
    logits = jnp.repeat(bound.unembed(variables, hidden[:, -1]), beams, axis=0)
    return _extended(state, logits, limit, sampling, eos)


@functools.partial(jax.jit, static_argnames=("bound", "sampling", "eos"), donate_argnames="state")
def search(variables, state: Beams, limit, *, bound: Bound, sampling: Sampling, eos) -> Beams:
    """Goes on until every row is done or has `limit` tokens."""

    def body(state: Beams) -> Beams:
        tokens = state.partial.tokens.reshape(-1, state.partial.tokens.shape[-1])
        batch = {
            "tokens": jax.lax.dynamic_index_in_dim(tokens, state.step - 1, axis=1),
            "positions": state.positions[:, None],
            "segment_ids": jnp.repeat((~state.done).astype(jnp.int32), sampling.beams)[:, None],
        }
        hidden, cache = bound.hidden(variables, batch, cache=state.cache)
        state = state.replace(cache=cache, positions=state.positions + 1)
        return _extended(state, bound.unembed(variables, hidden[:, -1]), limit, sampling, eos)

    return jax.lax.while_loop(lambda state: (state.step < limit) & ~jnp.all(state.done), body, state)


def _extended(state: Beams, logits: jax.Array, limit, sampling: Sampling, eos: tuple) -> Beams:
    """One more token: the best continuations over all beams of a row, finished or going on."""
    rows, beams = state.partial.scores.shape
    logprobs = jax.nn.log_softmax(logits).reshape(rows, beams, -1)
    vocabulary = logprobs.shape[-1]
    total = (state.partial.scores[..., None] + logprobs).reshape(rows, -1)
    scores, places = jax.lax.top_k(total, min((len(eos) + 1) * beams, total.shape[-1]))
    beam, token = places // vocabulary, places % vocabulary
    made = jax.tree.map(lambda x: _chosen(x, beam), state.partial)
    at = (slice(None), slice(None), state.step)
    candidates = Texts(
        tokens=made.tokens.at[at].set(token),
        logprobs=made.logprobs.at[at].set(scores - made.scores),
        lengths=made.lengths + 1,
        scores=scores,
    )
    ends = jnp.isin(token, jnp.asarray(eos, jnp.int32)) | (state.step + 1 >= limit)

    ended = ends & (jnp.arange(scores.shape[1]) < beams) & ~state.done[:, None]
    length = (state.step + 1).astype(scores.dtype)
    of_ended = jnp.where(ended, scores / length**sampling.length_penalty, -jnp.inf)
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], 1), state.finished, candidates.replace(scores=of_ended)
    )
    best = jax.lax.top_k(both.scores, beams)[1]
    finished = jax.tree.map(lambda x: _chosen(x, best), both)

    running, onward = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beams)
    partial = jax.tree.map(lambda x: _chosen(x, onward), candidates).replace(scores=running)
    source = (_chosen(beam, onward) + beams * jnp.arange(rows)[:, None]).reshape(-1)
    hopeless = running[:, 0] / length**sampling.length_penalty <= jnp.min(finished.scores, axis=1)
    return state.replace(
        cache=_each_row(lambda x: x[source], state.cache),
        partial=partial,
        finished=finished,
        done=state.done | hopeless,
        step=state.step + 1,
    )


def _chosen(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[b, index[b]]` of every row b."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _each_row(f, cache: KVCache) -> KVCache:
    """`f` on every array of a cache, with its rows first."""
    if isinstance(cache.keys, tuple):
        keys, values = jax.tree.map(f, (cache.keys, cache.values))
    else:
        keys, values = (jax.vmap(f)(x) for x in (cache.keys, cache.values))
    return dataclasses.replace(
        cache, keys=keys, values=values, positions=f(cache.positions), segment_ids=f(cache.segment_ids)
    )
