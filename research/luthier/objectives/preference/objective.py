"""From a packed batch to a loss of whole answers: the objective of everything in this folder.

The answers to one prompt are a group. They lie in one row, each a segment of its own with the prompt before it: of
group g, answer k has the segment id g·K + k + 1, and an answer that is not there leaves its id out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from luthier.objectives.fused_head import token_outputs
from luthier.objectives.logits import normalise
from luthier.objectives.objective import Batch, Objective, without_prompt
from luthier.objectives.preference.sequences import Pairs, Ranked, SequenceLoss, Unpaired
from luthier.objectives.preference.weighting import tail_weights
from luthier.parallel import Sharder

ALIGNMENT = ("chosen_alignment", "rejected_alignment")


class Answers(NamedTuple):
    """What is known of N groups of K answers; a row of the batch gives as many groups as could lie in it.

    Attributes:
      logprob, reference: Σ weight · log π(y_t) over the targets, of the policy and of the reference model.
      tokens: number of targets; 0 for an answer that is not there.
      scores: the answers' scores.
      alignment: mean over the targets of log π(y_t) − log Σ_v π(v)².
      chosen_nll: −Σ weight · log π(y_t) of the first answers, over their mean number of targets in the whole batch.
    """

    logprob: Float[Array, "N K"]
    tokens: Int[Array, "N K"]
    reference: Float[Array, "N K"] | None = None
    scores: Float[Array, "N K"] | None = None
    alignment: Float[Array, "N K"] | None = None
    chosen_nll: Float[Array, " N"] | None = None


def sequence_objective(
    loss: SequenceLoss, answers: int, sharder: Sharder, *, reference: Any = None, dropout: bool = False
) -> Objective:
    """The mean over groups of a loss of their answers' log-probabilities.

    Args:
      answers: K.
      reference: the bound reference model, whose variables are the collection `reference` where there is one, else
        the same as the policy's. None where the loss needs none, or where the batch holds `reference_logps`.
      dropout: whether the policy draws dropout masks in training; the reference never does.
    """
    is_aligned = any(name in loss.needs for name in ALIGNMENT)
    of_sums = dataclasses.replace(loss, tail=1.0)  # the sums are made with the tail's weights

    def sums(bound, variables, batch, rng):
        head_rng, dropout_rng = jax.random.split(rng)
        plain = {key: x for key, x in batch.items() if key != "token_ids"}
        score = functools.partial(_token_outputs, sharder=sharder, batch=batch, rng=head_rng)
        if reference is not None:
            theirs = jax.lax.stop_gradient(variables.get("reference", variables))
            seen = plain if reference.prompt_tuner else without_prompt(plain)
            plain = {**plain, "reference_logps": -score(_logprob, reference, theirs, seen)["loss"]}
        outputs = score(
            functools.partial(_logprob_and_metrics, is_aligned=is_aligned),
            bound,
            variables,
            batch if dropout else plain,
            rngs={"dropout": dropout_rng} if dropout else None,
        )
        found = _answers(loss, -outputs.pop("loss"), outputs.pop("alignment", None), plain, answers)
        value, metrics = of_sums(_inputs(loss, found))
        total = {name: (jnp.sum(jnp.where(n, x, 0)), jnp.sum(n)) for name, (x, n) in metrics.items()}
        targets = jnp.sum(batch["loss_weights"] != 0)
        return jnp.sum(value), total | {name: (jnp.sum(x), targets) for name, x in outputs.items()}

    return objective_of_groups(loss, answers, sums)


def objective_of_groups(loss: SequenceLoss, answers: int, sums: Callable) -> Objective:
    """The mean over groups of what `sums` adds up; an SFT term finds its `nll_scale` in the batch."""

    def count(batch: Batch) -> jax.Array:
        return jnp.sum(is_valid(loss, targets_of(batch, answers)))

    def prepare(batch: Batch) -> Batch:
        if "chosen_nll" not in loss.needs:
            return batch
        scale = count(batch) / jnp.maximum(jnp.sum(targets_of(batch, answers)[:, 0]), 1)
        return {**batch, "nll_scale": jnp.full((len(batch["tokens"]), 1), scale)}

    return Objective(count, sums, prepare)


def token_logprobs(bound: Any, variables: Any, batch: Batch) -> Float[Array, "B T"]:
    """log π of every target, 0 where there is none."""
    seen = batch if bound.prompt_tuner else without_prompt(batch)
    numbered = {**batch, "token_ids": jnp.zeros_like(batch["tokens"])}
    sharder = bound.model.sharder
    return -_token_outputs(_logprob, bound, variables, seen, sharder=sharder, batch=numbered, rng=jax.random.key(0))[
        "loss"
    ]


def by_answer(values: Array, segments: Int[Array, "B T"], *, answers: int) -> Array:
    """Sums of `[B, T]` values by answer: `[N, K]`, B · max_groups rows."""
    ids = max_groups(segments.shape[1], answers) * answers + 1
    total = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=ids))(values, segments)
    return total[:, 1:].reshape(-1, answers)


def max_groups(length: int, answers: int) -> int:
    """How many groups a row of so many tokens holds at most: an answer has two tokens, a group of several has two."""
    return max(1, length // (2 * min(answers, 2)))


def _token_outputs(chunk_fn: Callable, bound, variables, seen: Batch, *, sharder, batch, rng, rngs=None):
    """`chunk_fn(logits, targets)` of every target, `[B, T]`, 0 elsewhere; `seen` is what the model reads."""
    hidden, _ = bound.hidden(variables, seen, rngs=rngs)
    fn = lambda head, hidden, tok, keys: chunk_fn(bound.unembed(head, hidden), tok["targets"])  # noqa: E731
    tok, mask, vocabulary = {"targets": batch["targets"]}, batch["loss_weights"] != 0, bound.model.config.vocab_size
    return token_outputs(fn, vocabulary, sharder, bound.head(variables), hidden, mask, tok, batch["token_ids"], rng)


def _logprob(logits, targets) -> dict[str, Array]:
    return {"loss": -normalise(logits, targets).logprob}


def _logprob_and_metrics(logits, targets, *, is_aligned: bool) -> dict[str, Array]:
    log_z, logprob, metrics = normalise(logits, targets)
    if is_aligned:
        metrics["alignment"] = logprob - (jax.nn.logsumexp(2 * logits, axis=-1) - 2 * log_z)
    return {"loss": -logprob, **metrics}


def _answers(loss: SequenceLoss, logps, alignment, batch: Batch, answers: int) -> Answers:
    """Token values `[B, T]`, summed by answer."""
    mask, plain, tokens = batch["loss_weights"] != 0, batch["loss_weights"], targets_of(batch, answers)
    tail = _tail_weights(mask, batch["segment_ids"], tokens, answers, loss.tail) if loss.tail != 1 else 1
    weights = plain * tail
    chosen = functools.partial(by_answer, segments=batch["segment_ids"], answers=answers)
    found = Answers(chosen(weights * logps), tokens)
    if "reference_logps" in batch:
        theirs = jnp.where(mask, jax.lax.stop_gradient(batch["reference_logps"]), 0)
        found = found._replace(reference=chosen(weights * theirs))
    if "scores" in batch:
        found = found._replace(scores=_scores(batch["scores"], mask, batch["segment_ids"], answers))
    if alignment is not None:
        found = found._replace(alignment=chosen(alignment) / jnp.maximum(tokens, 1))
    if "nll_scale" in batch:
        scale = jnp.repeat(batch["nll_scale"][:, 0], len(tokens) // len(mask))
        found = found._replace(chosen_nll=-chosen(plain * logps)[:, 0] * scale)
    return found


def targets_of(batch: Batch, answers: int) -> Int[Array, "N K"]:
    """How many targets each answer has; 0 for one that is not there."""
    return by_answer((batch["loss_weights"] != 0).astype(jnp.int32), batch["segment_ids"], answers=answers)


def _scores(scores, mask, segments, answers: int) -> Float[Array, "N K"]:
    """The score of each answer, which the batch repeats at every token; 0 where there is no answer."""
    ids = max_groups(mask.shape[1], answers) * answers + 1
    largest = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=ids))
    found = largest(jnp.where(mask, scores, -jnp.inf), segments)[:, 1:].reshape(-1, answers)
    return jnp.where(jnp.isfinite(found), found, 0)


def _tail_weights(mask, segments, tokens, answers: int, alpha: float) -> Float[Array, "B T"]:
    """LD-DPO's weight of each target."""
    before = jnp.cumsum(mask, axis=1) - mask
    starts = jnp.where(segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0))), before, -1)
    position = before - jax.lax.cummax(starts, axis=1)
    shared = jnp.repeat(jnp.min(tokens, axis=1).reshape(len(mask), -1), answers, axis=1)
    own = jnp.take_along_axis(jnp.pad(shared, ((0, 0), (1, 0))), segments, axis=1)
    return tail_weights(position, own, alpha=alpha)


def is_valid(loss: SequenceLoss, tokens: Int[Array, "N K"]) -> Bool[Array, " N"]:
    """Which groups are there: those with all answers, or with two where the loss ranks any number."""
    return jnp.sum(tokens > 0, axis=1) >= (2 if "present" in loss.inputs._fields else tokens.shape[1])


def _inputs(loss: SequenceLoss, found: Answers) -> Any:
    return {Pairs: _pairs, Unpaired: _unpaired, Ranked: _ranked}[loss.inputs](found, is_valid(loss, found.tokens))


def _pairs(found: Answers, valid: Bool[Array, " N"]) -> Pairs:
    chosen, rejected = found.logprob.T
    made = Pairs(
        chosen,
        rejected,
        valid=valid,
        chosen_tokens=found.tokens[:, 0],
        rejected_tokens=found.tokens[:, 1],
        chosen_nll=found.chosen_nll,
    )
    if found.reference is not None:
        made = made._replace(ref_chosen=found.reference[:, 0], ref_rejected=found.reference[:, 1])
    if found.alignment is not None:
        made = made._replace(chosen_alignment=found.alignment[:, 0], rejected_alignment=found.alignment[:, 1])
    return made


def _unpaired(found: Answers, valid: Bool[Array, " N"]) -> Unpaired:
    made = Unpaired(found.logprob[:, 0], found.reference[:, 0], found.scores[:, 0] > 0.5, valid)
    if found.logprob.shape[1] == 1:
        return made
    return made._replace(kl_logprob=found.logprob[:, 1], kl_reference=found.reference[:, 1])


def _ranked(found: Answers, valid: Bool[Array, " N"]) -> Ranked:
    return Ranked(found.logprob, found.reference, found.scores, found.tokens, found.tokens > 0, valid)
