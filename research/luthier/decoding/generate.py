"""Text from a policy: prefill, then one token a pass through a key/value cache on the device.

Rows are padded on the left to one of few lengths, so a steady stream of prompts meets compiled
programs. A row's tokens depend on its prompt and its index alone, not on who shares its batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from luthier.decoding import batching, beam
from luthier.decoding.policy import Policy, Prompt
from luthier.decoding.sampling import Sampling, draw
from luthier.errors import LuthierError
from luthier.models import KVCache, init_cache
from luthier.models.apart import cache_apart
from luthier.tuners import Bound

# Decode steps between two looks for stop strings: few enough to waste little, enough to hide the look.
STOP_CHECK = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
      text: without special tokens, cut before the first stop string.
      token_ids: all tokens made, up to the one that ended the text, with it.
      logprobs: log-probability of each under the model itself (temperature 1, nothing removed).
      finish_reason: `eos`, `stop` (a stop string) or `length`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["eos", "stop", "length"]


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continues each prompt, in order.

    Args:
      prompts: text, chat messages (`{"role", "content"}` each), or token ids. With several
        processes every one gives the same prompts and gets all results.
      progress: called with (prompts done, prompts in all) after each batch.

    Raises:
      LuthierError: for an empty prompt, one that leaves too little room in the context, or a reward model.
    """
    policy.check_language_model()
    room = [0] * len(policy.prompt_slots)
    encoded = [[*room, *policy.encode(prompt, where=f"prompt {i}")] for i, prompt in enumerate(prompts)]
    _check_lengths(policy, encoded, sampling)
    run = lambda chosen, size: _batch(policy, chosen, [encoded[i] for i in chosen], sampling, size)  # noqa: E731
    return batching.in_batches(policy.bound, list(map(len, encoded)), batch_size, run, progress)


def _check_lengths(policy: Policy, encoded: Sequence[Sequence[int]], sampling: Sampling) -> None:
    context = policy.bound.model.config.max_length
    for i, tokens in enumerate(encoded):
        if len(tokens) + sampling.max_new_tokens > context:
            raise LuthierError(
                f"{len(tokens)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the context of {context}",
                where=f"prompt {i}",
                mend="Shorten the prompt or lower max_new_tokens",
            )


@flax.struct.dataclass
class _Rows:
    """State of the loop: B rows, room for N new tokens each.

    `lengths` counts tokens made; `step` is the index of the next token, the same for all rows.
    """

    cache: KVCache
    keys: jax.Array
    positions: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    done: jax.Array
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("bound", "room", "apart", "sampling", "eos"))
def _prefill(
    variables, batch, indices, done, seed, *, bound: Bound, room: int, apart: bool, sampling: Sampling, eos: tuple
) -> _Rows:
    """Reads the prompts `[B, P]` into a fresh cache and makes the first token of each row."""
    rows, length = batch["tokens"].shape
    cache = init_cache(bound.model.config, rows, length + room, bound.model.dtype)
    hidden, cache = bound.hidden(variables, batch, cache=cache)
    state = _Rows(
        cache=cache_apart(cache) if apart else cache,
        keys=jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices),
        positions=batch["positions"][:, -1] + 1,
        tokens=jnp.zeros((rows, room), jnp.int32),
        logprobs=jnp.zeros((rows, room), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        done=done,
        step=jnp.int32(0),
    )
    return _extended(state, bound.unembed(variables, hidden[:, -1]), sampling, eos)


@functools.partial(jax.jit, static_argnames=("bound", "sampling", "eos"), donate_argnames="state")
def _decode(variables, state: _Rows, until, *, bound: Bound, sampling: Sampling, eos: tuple) -> _Rows:
    """Makes tokens up to index `until`, or until every row is done."""

    def body(state: _Rows) -> _Rows:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1)
        batch = {
            "tokens": last,
            "positions": state.positions[:, None],
            "segment_ids": (~state.done).astype(jnp.int32)[:, None],
        }
        hidden, cache = bound.hidden(variables, batch, cache=state.cache)
        state = state.replace(cache=cache, positions=state.positions + 1)
        return _extended(state, bound.unembed(variables, hidden[:, -1]), sampling, eos)

    return jax.lax.while_loop(lambda state: (state.step < until) & ~jnp.all(state.done), body, state)


def _extended(state: _Rows, logits: jax.Array, sampling: Sampling, eos: tuple) -> _Rows:
    """The state with one more token in every row that is not done."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
    token = jnp.where(state.done, 0, draw(logits, keys, sampling))
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    at = (slice(None), state.step)
    return state.replace(
        tokens=state.tokens.at[at].set(token),
        logprobs=state.logprobs.at[at].set(jnp.where(state.done, 0.0, logprob)),
        lengths=state.lengths + ~state.done,
        done=state.done | jnp.isin(token, jnp.asarray(eos, jnp.int32)),
        step=state.step + 1,
    )


def _batch(
    policy: Policy, indices: Sequence[int], prompts: Sequence[Sequence[int]], sampling: Sampling, size: int
) -> list[Generation]:
    """Runs one batch, filled up to `size` rows with rows that are done from the start."""
    spare = size - len(prompts)
    length = batching.bucket(max(map(len, prompts)))
    batch = batching.padded([*prompts, *[[0]] * spare], length, left=True, prompt_slots=policy.prompt_slots)
    done = np.arange(size) >= len(prompts)
    inputs = batching.to_device(policy.bound, (batch, np.asarray([*indices, *[0] * spare], np.int32), done))
    room = batching.bucket(sampling.max_new_tokens)
    # Stop strings, seed and length are no part of the program.
    static = dataclasses.replace(sampling, stop=(), seed=0, max_new_tokens=1)
    fixed = {"bound": policy.bound, "sampling": static, "eos": policy.eos_ids}
    apart = policy.layers_apart
    if sampling.beams > 1:
        best = _search(policy, batch, done, sampling.max_new_tokens, apart, {"room": room}, fixed)
        return [_cut(policy, tokens, logprobs, sampling.stop) for tokens, logprobs in best[: len(prompts)]]
    state = _prefill(
        policy.variables, *inputs, np.uint32(sampling.seed % 2**32), room=room, apart=apart is not None, **fixed
    )
    stops: dict[int, tuple[int, str]] = {}
    until = 1
    while until < sampling.max_new_tokens:
        until = min(until + STOP_CHECK, sampling.max_new_tokens) if sampling.stop else sampling.max_new_tokens
        state = _decode(apart or policy.variables, state, np.int32(until), **fixed)
        made, lengths, done = batching.to_host((state.tokens, state.lengths, state.done))
        if sampling.stop:
            stops |= _stopped(policy, made[: len(prompts)], lengths, stops, sampling.stop)
            done = done | np.isin(np.arange(size), list(stops))
            state = state.replace(done=batching.to_device(policy.bound, done))
        if done.all():
            break
    made, logprobs, lengths = batching.to_host((state.tokens, state.logprobs, state.lengths))
    if sampling.stop:
        stops |= _stopped(policy, made[: len(prompts)], lengths, stops, sampling.stop)
    return [
        _generation(policy, made[i, :n], logprobs[i, :n], stops.get(i)) for i, n in enumerate(lengths[: len(prompts)])
    ]


def _search(policy: Policy, batch, done, limit: int, apart, room, fixed) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and their log-probabilities of each row's best text."""
    batch, done = batching.to_device(policy.bound, (batch, done))
    limit = np.int32(limit)
    state = beam.prefill(policy.variables, batch, done, limit, apart=apart is not None, **room, **fixed)
    found = beam.search(apart or policy.variables, state, limit, **fixed).finished
    tokens, logprobs, lengths = batching.to_host((found.tokens[:, 0], found.logprobs[:, 0], found.lengths[:, 0]))
    return [(t[:n], p[:n]) for t, p, n in zip(tokens, logprobs, lengths)]


def _cut(policy: Policy, tokens: np.ndarray, logprobs: np.ndarray, stop: Sequence[str]) -> Generation:
    """A whole text, cut where a stop string begins."""
    stops = _stopped(policy, tokens[None], np.asarray([len(tokens)]), {}, stop) if stop else {}
    return _generation(policy, tokens, logprobs, stops.get(0))


def _stopped(
    policy: Policy, made: np.ndarray, lengths: np.ndarray, known: Mapping[int, tuple[int, str]], stop: Sequence[str]
) -> dict[int, tuple[int, str]]:
    """For rows that now hold a stop string: (fewest tokens that hold it, the text before it)."""
    found = {}
    for i, (row, length) in enumerate(zip(made, lengths)):
        if i in known or not any(s in policy.decode(row[:length]) for s in stop):
            continue
        texts = ((n, policy.decode(row[:n])) for n in range(1, length + 1))
        n, text = next((n, text) for n, text in texts if any(s in text for s in stop))
        found[i] = n, text[: min(text.find(s) for s in stop if s in text)]
    return found


def _generation(policy: Policy, tokens: np.ndarray, logprobs: np.ndarray, stop: tuple[int, str] | None) -> Generation:
    count, text = stop if stop else (len(tokens), policy.decode(tokens))
    ended = "stop" if stop else "eos" if tokens[-1] in policy.eos_ids else "length"
    return Generation(text, tuple(tokens[:count].tolist()), tuple(logprobs[:count].tolist()), ended)
