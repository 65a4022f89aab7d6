"""Whether a model prefers what it should: answers to one prompt, ranked by reward or by likelihood."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.data import groups
from luthier.data.records import Example, Format, Text
from luthier.data.tokenize import Tokens
from luthier.decoding import Policy
from luthier.decoding.reward import rewards_of_tokens
from luthier.decoding.score import score_tokens
from luthier.errors import LuthierError, near
from luthier.evals import statistics
from luthier.evals.cases import read_records
from luthier.evals.results import EvalResult

NORMALISATIONS = ("none", "tokens")


def preferences(
    policy: Policy,
    *,
    label: str,
    data: str,
    format: str = "auto",
    train_on: str = "completion",
    normalise: str = "none",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    soft_prompt: int = 0,
    without: tuple = (),
) -> EvalResult:
    """Share of pairs of answers whose better one gets the larger value.

    The value of an answer is the reward r(x, y) of a reward model, and log π(y | x) of any other. Of ranked answers
    every two of different scores are a pair and a record's share counts once; a record without any is left out.
    `margin` beside it is the mean difference of the two values.

    Args:
      data: records of a format of preferences: pairs, or answers with scores.
      format: name of the format (docs/data.md), or `auto`.
      train_on: which tokens are the answer: `completion`, or `assistant` for what the model wrote of several turns.
      normalise: what a log-probability is divided by: `none`, or the answer's `tokens`, as SimPO compares.
      limit: read only the first so many.
      soft_prompt: number of the soft prompt to ask with, where the policy has any.
      without: collections of tuners to leave out, such as `prompt`.

    Source: arXiv 2405.19534 (ranking accuracy of likelihoods); 2403.13787 (of rewards).
    """
    policy = policy.asked(soft_prompt=soft_prompt, without=without)
    if normalise not in NORMALISATIONS:
        raise LuthierError(f"unknown value {normalise!r}", where="normalise", mend=near(normalise, NORMALISATIONS))
    if normalise == "tokens" and policy.bound.is_reward_model:
        raise LuthierError("a reward is not divided by tokens", where="normalise", mend="Leave it out")
    found, form = read_records(data, limit), Format(format)
    places = [where for _, where in found]
    read = [_read(form, *one) for one in found]
    tokens = groups.tokenized(
        [(group,) for group, _ in read],
        places,
        tokenizer=policy.tokenizer,
        template=policy.template,
        train_on=train_on,
    )
    answers = [place for place, (group, _) in zip(places, read) for _ in group.answers]
    values = iter(_values(policy, tokens, answers, normalise, batch_size))
    records, gaps = [], []
    for place, (group, pairs) in zip(places, read):
        of_answer = [next(values) for _ in group.answers]
        differences = [of_answer[better] - of_answer[worse] for better, worse in pairs]
        if pairs:
            prompt, _ = _words(group.answers[0])
            expected, made = (_words(group.answers[i])[1] for i in (pairs[0][0], int(np.argmax(of_answer))))
            score = float(np.mean([gap > 0 for gap in differences]))
            records.append({"prompt": prompt, "expected": expected, "completion": made, "score": score})
            records[-1] |= {"where": place, "values": of_answer}
            gaps.append(float(np.mean(differences)))
    if not records:
        raise LuthierError("no record has two answers of different scores", where=data)
    _, interval = statistics.of_scores([record["score"] for record in records], seed=seed)
    metrics = {"margin": float(np.mean(gaps)), "left_out": float(len(found) - len(records)), "chance": 0.5}
    return EvalResult.of(label, "accuracy", interval, records, metrics)


def _read(form: Format, record: Any, where: str) -> tuple[groups.Group, list[tuple[int, int]]]:
    """The answers of a record, and which of them is better than which."""
    named = groups.told(form, record, where, answers=2, mismatched=False)
    group = groups.read(named, record, where, most=math.inf)
    count = len(group.answers)
    if named.name == "ranked_preference":
        pairs = [(i, k) for i, k in itertools.permutations(range(count), 2) if group.scores[i] > group.scores[k]]
        return group, pairs
    return group, [(0, k) for k in range(1, count) if group.answers[0] != group.answers[k]]


def _values(
    policy: Policy, tokens: Sequence[Tokens], places: Sequence[str], normalise: str, batch_size: int
) -> list[float]:
    context = policy.bound.model.config.max_length - len(policy.prompt_slots)
    for place, one in zip(places, tokens):
        if len(one.ids) > context:
            raise LuthierError(f"{len(one.ids)} tokens exceed the context of {context}", where=place)
    if policy.bound.is_reward_model:
        return rewards_of_tokens(policy, [one.ids for one in tokens], batch_size=batch_size)
    masks = [one.weights > 0 for one in tokens]
    for place, mask in zip(places, masks):
        if not mask.any():
            raise LuthierError("an answer has no token of its own", where=place, mend="Delete the record")
    firsts = [int(np.argmax(mask)) for mask in masks]
    pairs = [(one.ids[:first], one.ids[first:]) for one, first in zip(tokens, firsts)]
    scored = score_tokens(policy, pairs, batch_size=batch_size)
    found = [np.asarray(s.logprobs)[mask[first:]] for s, mask, first in zip(scored, masks, firsts)]
    return [float(np.mean(x) if normalise == "tokens" else np.sum(x, dtype=np.float64)) for x in found]


def _words(answer: Example) -> tuple[Any, Any]:
    """(prompt, answer) to show: text, or messages."""
    if isinstance(answer, Text):
        return answer.segments[0].text, answer.segments[1].text
    after = answer.messages[answer.prompt_turns :]
    return list(answer.messages[: answer.prompt_turns]), after[0]["content"] if len(after) == 1 else list(after)
