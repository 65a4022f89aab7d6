"""How far a model moved from where it started: KL divergence and changed top tokens on given texts."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from luthier.decoding import Policy, batching
from luthier.decoding.policy import from_source
from luthier.errors import LuthierError
from luthier.evals import statistics
from luthier.evals.cases import read_tokens
from luthier.evals.results import EvalResult
from luthier.tuners import Bound


@dataclasses.dataclass(frozen=True)
class Shift:
    """At each asked position of one text: KL(start ‖ now) in nats, and whether the likeliest token is another."""

    kl: Float[np.ndarray, " n"]
    changed: Bool[np.ndarray, " n"]


def shift(
    policy: Policy,
    *,
    label: str,
    data: str,
    start: str,
    format: str = "auto",
    train_on: str = "completion",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    soft_prompt: int = 0,
    without: tuple = (),
) -> EvalResult:
    """Mean KL(start ‖ now) = Σ_v p_start(v) log(p_start(v) / p_now(v)) over positions, in nats a token.

    `token_shift` beside it is the share of positions whose likeliest token is another. The interval resamples records.

    Args:
      data: records of any training format; the prediction of each target is a position.
      start: the model to compare with, as in `model(source)`: the one that the run started from.
      format: name of the format (docs/data.md), or `auto`.
      train_on: which tokens are targets: `completion`, `assistant` or `all`.
      limit: read only the first so many.
      soft_prompt: number of the soft prompt that the model has now, where it has any.
      without: collections of tuners to leave out, such as `prompt`.
    """
    policy = policy.asked(soft_prompt=soft_prompt, without=without)
    tokenized, places = read_tokens(policy, data, format=format, train_on=train_on, limit=limit)
    context = policy.bound.model.config.max_length - len(policy.prompt_slots)
    for place, tokens in zip(places, tokenized):
        if len(tokens.ids) > context + 1:
            raise LuthierError(f"{len(tokens.ids)} tokens exceed the context of {context}", where=place)
    rows = [(tokens.ids, np.flatnonzero(tokens.weights)) for tokens in tokenized]
    model = policy.bound.model
    dtype = jnp.dtype(model.dtype).name
    begun = from_source(start, compute_dtype=dtype, attention=model.attention, sharder=model.sharder)
    found = token_shift(begun, policy, rows, batch_size=batch_size)
    kl, changed, size = (np.array([f(s) for s in found]) for f in (_total_kl, _total_changed, _size))
    mean = statistics.ratio(kl, size, seed=seed)
    metrics = {"token_shift": float(changed.sum() / size.sum()), "tokens": float(size.sum())}
    records = [
        {"where": place, "kl": float(k), "changed": int(c), "tokens": int(n)}
        for place, k, c, n in zip(places, kl, changed, size)
    ]
    return EvalResult.of(label, "kl", mean, records, metrics)


def token_shift(
    start: Policy,
    now: Policy,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
) -> list[Shift]:
    """The shift at chosen tokens of each row, in order.

    Args:
      start, now: of one vocabulary and on one mesh.
      rows: token ids, and the places (1 …) of tokens whose predictions are compared.
    """
    now.check_language_model()
    sizes = [policy.bound.model.config.vocab_size for policy in (start, now)]
    if sizes[0] != sizes[1]:
        raise LuthierError(f"the vocabularies differ: {sizes[0]} tokens at the start, {sizes[1]} now", where="start")
    run = lambda chosen, size: _batch(start, now, [rows[i] for i in chosen], size)  # noqa: E731
    return batching.in_batches(now.bound, [len(ids) for ids, _ in rows], batch_size, run)


_total_kl = lambda s: s.kl.sum(dtype=np.float64)  # noqa: E731
_total_changed = lambda s: s.changed.sum()  # noqa: E731
_size = lambda s: len(s.kl)  # noqa: E731


def _batch(start: Policy, now: Policy, rows: Sequence[tuple], size: int) -> list[Shift]:
    longest = batching.bucket(max(1, *(len(chosen) for _, chosen in rows)))
    places = np.zeros((size, longest), np.int32)
    for i, (_, chosen) in enumerate(rows):
        places[i, : len(chosen)] = np.asarray(chosen) - 1  # the place that predicts the token
    sides = []
    for policy in (start, now):
        slots = policy.prompt_slots
        inputs = [[*[0] * len(slots), *ids[:-1]] for ids, _ in rows] + [[0]] * (size - len(rows))
        batch = batching.padded(inputs, batching.bucket(max(map(len, inputs))), left=False, prompt_slots=slots)
        hidden = _hidden(policy.variables, batching.to_device(now.bound, batch), bound=policy.bound)
        sides.append((policy.variables, hidden, batching.to_device(now.bound, places + len(slots))))
    kl, changed = batching.to_host(_compared(*sides, start=start.bound, now=now.bound))
    return [Shift(kl[i, : len(chosen)], changed[i, : len(chosen)]) for i, (_, chosen) in enumerate(rows)]


@functools.partial(jax.jit, static_argnames="bound")
def _hidden(variables: Mapping[str, Any], batch, *, bound: Bound) -> Float[Array, "B T E"]:
    return bound.hidden(variables, batch)[0]


@functools.partial(jax.jit, static_argnames=("start", "now"))
def _compared(old, new, *, start: Bound, now: Bound) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """KL and changed top token; both models' logits exist for a few places at a time.

    Args:
      old, new: of each model its variables, hidden states `[B, T, E]` and places `[B, C]`.
    """

    def logits(bound: Bound, side, places):
        variables, hidden, _ = side
        return bound.unembed(variables, jnp.take_along_axis(hidden, places[..., None], axis=1))

    def chunk(places):
        ours, theirs = logits(start, old, places[0]), logits(now, new, places[1])
        before, after = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
        kl = jnp.sum(jnp.exp(before) * (before - after), axis=-1)
        return kl, jnp.argmax(ours, axis=-1) != jnp.argmax(theirs, axis=-1)

    return batching.in_chunks(chunk, (old[2], new[2]), now.model.config.vocab_size)
