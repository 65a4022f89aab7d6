"""Rewards of given answers by a reward model, in batches of few shapes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from luthier.decoding import batching
from luthier.decoding.policy import Policy
from luthier.decoding.score import split_pair
from luthier.errors import LuthierError
from luthier.tuners import Bound


def rewards(
    policy: Policy,
    pairs: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The reward of each `{"prompt", "completion"}`, in order.

    Both are text or chat messages. The model reads what it reads in training: a completion of text ends with EOS, once,
    one of messages with its end-of-turn token.

    Raises:
      LuthierError: for a model without a reward, an empty completion, or a pair longer than the context.
    """
    tokens = [_ended(policy, pair, where=f"pair {i}") for i, pair in enumerate(pairs)]
    return rewards_of_tokens(policy, tokens, batch_size=batch_size, progress=progress)


def rewards_of_tokens(
    policy: Policy,
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The reward of each text of token ids: at its last token that is not the config's `pad_token_id`.

    That is where transformers' sequence classifiers read it: where padding is EOS, at the token before EOS.
    """
    if not policy.bound.is_reward_model:
        raise LuthierError("the model gives no reward", mend="Give a reward model, or leave --reward out")
    context = policy.bound.model.config.max_length - len(policy.prompt_slots)
    for i, text in enumerate(texts):
        if not 0 < len(text) <= context:
            raise LuthierError(f"{len(text)} tokens; the context is {context}", where=f"pair {i}")
    run = lambda chosen, size: _batch(policy, [texts[i] for i in chosen], size)  # noqa: E731
    return batching.in_batches(policy.bound, list(map(len, texts)), batch_size, run, progress)


def _ended(policy: Policy, pair: Mapping[str, Any], *, where: str) -> list[int]:
    prompt, completion = split_pair(policy, pair, where=where)
    whole, eos = [*prompt, *completion], policy.tokenizer.eos_id
    if eos is None or not isinstance(pair["prompt"], str) or not isinstance(pair["completion"], str):
        return whole
    while whole[-1:] == [eos]:
        whole.pop()
    return [*whole, eos]


def _batch(policy: Policy, texts: Sequence[Sequence[int]], size: int) -> list[float]:
    slots, padding = policy.prompt_slots, policy.bound.model.config.pad_token_id
    rows = [[*[0] * len(slots), *text] for text in texts] + [[0]] * (size - len(texts))
    batch = batching.padded(rows, batching.bucket(max(map(len, rows))), left=False, prompt_slots=slots)
    ends = np.zeros(size, np.int32)
    for i, text in enumerate(texts):
        ends[i] = len(slots) + max(np.flatnonzero(np.asarray(text) != padding), default=0)
    inputs = batching.to_device(policy.bound, (batch, ends))
    found = batching.to_host(_rewards(policy.variables, *inputs, bound=policy.bound))
    return found[: len(texts)].tolist()


@functools.partial(jax.jit, static_argnames="bound")
def _rewards(variables, batch, ends: Int[Array, " B"], *, bound: Bound) -> Float[Array, " B"]:
    hidden, _ = bound.hidden(variables, batch)
    return bound.unembed(variables, jnp.take_along_axis(hidden, ends[:, None, None], axis=1))[:, 0, 0]
