"""Log-probabilities of given completions, in batches of few shapes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from luthier.data.records import Format, prompt_of, refuse_system
from luthier.decoding import batching
from luthier.decoding.policy import Policy
from luthier.errors import LuthierError
from luthier.tuners import Bound


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities (nats) of a completion's tokens given the prompt, and their sum."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    logprob: float


def score(
    policy: Policy,
    pairs: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores each `{"prompt", "completion"}`, in order.

    Both are text or chat messages, these after the pair's `system` if it has one. An empty text prompt stands for the
    start of a text (BOS, or EOS for a tokenizer without one). A completion of messages ends with its end-of-turn
    token; one of text is scored as it is, without EOS.

    Raises:
      LuthierError: for an empty completion, or a pair longer than the context.
    """
    tokens = [split_pair(policy, pair, where=f"pair {i}") for i, pair in enumerate(pairs)]
    return score_tokens(policy, tokens, batch_size=batch_size, progress=progress)


def split_pair(policy: Policy, pair: Mapping[str, Any], *, where: object = "pair") -> tuple[list[int], list[int]]:
    """Token ids of (context, completion), tokenised together as in training."""
    for key in ("prompt", "completion"):
        if key not in pair:
            raise LuthierError(f"no field {key!r}", where=where, mend='Write {"prompt": …, "completion": …}')
    prompt, completion = pair["prompt"], pair["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        refuse_system(pair, str(where))
        whole, context = policy.text_ids(prompt + completion), policy.text_ids(prompt)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = prompt_of(Format(), {**pair, "prompt": messages}, str(where))
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        closers = [text for i in policy.eos_ids if (text := policy.tokenizer.token(i))]
        rendered = policy.chat(where).render_completion([*prompt, *answer], len(prompt), closers)
        ((start, end),) = rendered.trained
        whole, context = (policy.tokenizer.encode(rendered.text[:stop]) for stop in (end, start))
    shared = 0
    while shared < min(len(context), len(whole)) and context[shared] == whole[shared]:
        shared += 1
    # Where a token spans the seam it belongs to the completion, as in training.
    context, completion_ids = whole[:shared], whole[shared:]
    if not completion_ids:
        raise LuthierError("the completion is empty", where=where, mend="Give it some text")
    return context or _start(policy, where), completion_ids


def score_tokens(
    policy: Policy,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores the second of each pair of token ids given the first, which must not be empty."""
    policy.check_language_model()
    context = policy.bound.model.config.max_length - len(policy.prompt_slots)
    for i, (prompt, completion) in enumerate(pairs):
        if not len(prompt) or not len(completion):
            raise LuthierError("prompt and completion need a token each", where=f"pair {i}")
        if len(prompt) + len(completion) - 1 > context:
            raise LuthierError(
                f"{len(prompt)} + {len(completion)} tokens exceed the context of {context}", where=f"pair {i}"
            )
    run = lambda chosen, size: _batch(policy, [pairs[i] for i in chosen], size)  # noqa: E731
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    return batching.in_batches(policy.bound, lengths, batch_size, run, progress)


def _start(policy: Policy, where: object) -> list[int]:
    start = policy.tokenizer.bos_id if policy.tokenizer.bos_id is not None else policy.tokenizer.eos_id
    if start is None:
        raise LuthierError("an empty prompt needs a BOS or EOS token, and the tokenizer has neither", where=where)
    return [start]


def _batch(policy: Policy, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], size: int) -> list[Score]:
    slots = policy.prompt_slots
    pairs = [([*[0] * len(slots), *prompt], completion) for prompt, completion in pairs]
    rows = [[*prompt, *completion][:-1] for prompt, completion in pairs] + [[0]] * (size - len(pairs))
    batch = batching.padded(rows, batching.bucket(max(map(len, rows))), left=False, prompt_slots=slots)
    longest = batching.bucket(max(len(completion) for _, completion in pairs))
    places, targets = np.zeros((2, size, longest), np.int32)
    for i, (prompt, completion) in enumerate(pairs):
        places[i, : len(completion)] = np.arange(len(completion)) + len(prompt) - 1
        targets[i, : len(completion)] = completion
    inputs = batching.to_device(policy.bound, (batch, places, targets))
    logprobs = batching.to_host(_logprobs(policy.variables, *inputs, bound=policy.bound))
    found = [(tuple(map(int, c)), tuple(logprobs[i, : len(c)].tolist())) for i, (_, c) in enumerate(pairs)]
    return [Score(ids, values, float(np.sum(values, dtype=np.float64))) for ids, values in found]


@functools.partial(jax.jit, static_argnames="bound")
def _logprobs(
    variables, batch, places: Int[Array, "B C"], targets: Int[Array, "B C"], *, bound: Bound
) -> Float[Array, "B C"]:
    """log p(target) at the given places of each row; logits exist for a few places at a time."""
    hidden, _ = bound.hidden(variables, batch)

    def chunk(inputs):
        places, targets = inputs
        logits = bound.unembed(variables, jnp.take_along_axis(hidden, places[..., None], axis=1))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return batching.in_chunks(chunk, (places, targets), bound.model.config.vocab_size)
