"""Evaluations that a recipe can name: (policy, options) → `EvalResult`.

Accuracies carry Wilson's interval, other means a bootstrap over examples (95%).
"""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np

from luthier.data.demonstrations import SEPARATOR
from luthier.decoding import Policy, Sampling, generate, score
from luthier.decoding.score import score_tokens
from luthier.errors import LuthierError, near
from luthier.evals import statistics, verifiers
from luthier.evals.cases import Case, few_shot, read_cases, read_records, read_tokens, shot_pool
from luthier.evals.results import EvalResult


def verifier(
    policy: Policy,
    *,
    label: str,
    data: str,
    verifier: str = "integer",
    shots: int = 0,
    shots_from: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    stop: tuple = (),
    beams: int = 1,
    retention: bool = False,
    chance: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    soft_prompt: int = 0,
    without: tuple = (),
) -> EvalResult:
    """Mean reward of generated answers.

    Args:
      data: records with a prompt; whatever the verifier reads (usually `completion`) is beside it.
      verifier: a name of `luthier.evals.verifiers.VERIFIERS`.
      shots: solved examples before each prompt, drawn from `shots_from`.
      stop: strings that end an answer; a blank line does so too after shots in text.
      beams: width of a beam search.
      retention: whether the report's table of what was kept has this task (`luthier.evals.retention`).
      chance: reward of an answer that ignores the question; None is 0.
      limit: ask only the first so many.
      soft_prompt: number of the soft prompt to ask with, where the policy has any.
      without: collections of tuners to leave out, such as `prompt`.
    """
    policy = policy.asked(soft_prompt=soft_prompt, without=without)
    reward = verifiers.find(verifier)
    cases = read_cases(data, limit)
    prompts = few_shot(cases, shot_pool(shots, shots_from), shots, seed)
    stops = (*stop, SEPARATOR) if shots and isinstance(cases[0].prompt, str) else tuple(stop)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, stop=stops, seed=seed, beams=beams)
    made = generate(policy, prompts, sampling, batch_size=batch_size)
    records = []
    for case, generation in zip(cases, made):
        answered = dict(case.record) if case.answer is None else {**case.record, "completion": case.answer}
        score = _checked(reward, generation.text, answered, case.where)
        expected = verifiers.answer_of(answered) if verifiers.has_answer(answered) else None
        records.append(
            {
                "prompt": case.prompt,
                "expected": expected,
                "completion": generation.text,
                "score": score,
                "finish_reason": generation.finish_reason,
            }
        )
    share, interval = statistics.of_scores([record["score"] for record in records], seed=seed)
    metrics = {
        "mean_tokens": float(np.mean([len(generation.token_ids) for generation in made])),
        "ended": float(np.mean([generation.finish_reason != "length" for generation in made])),
        "chance": chance or 0.0,
    }
    return EvalResult.of(label, "accuracy" if share else "reward", interval, records, metrics, shots)


def _checked(reward: verifiers.Verifier, completion: str, record: Mapping, where: str) -> float:
    try:
        return float(reward(completion, record))
    except LuthierError as error:
        raise LuthierError(error.what, where=where, mend=error.mend) from None


NORMALISATIONS = ("none", "tokens", "bytes")


def choices(
    policy: Policy,
    *,
    label: str,
    data: str,
    normalise: str = "bytes",
    shots: int = 0,
    shots_from: str | None = None,
    limit: int | None = None,
    retention: bool = False,
    chance: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    soft_prompt: int = 0,
    without: tuple = (),
) -> EvalResult:
    """Accuracy of the option with the largest log-likelihood.

    Args:
      data: records with a `prompt`, `options` and the right one as `completion`, `output` or `answer`
        (its text, or its index from 0); or MetaICL's (`input`, `output`, `options`), joined by a line break.
      normalise: what an option's log-likelihood is divided by: `none`, its `tokens` or its `bytes`.
      shots: solved examples before each prompt, drawn from `shots_from` (records of the same form).
      retention: whether the report's table of what was kept has this task (`luthier.evals.retention`).
      chance: accuracy of an answer that ignores the question; None is the larger of guessing and the commonest answer.
      limit: ask only the first so many.
      soft_prompt: number of the soft prompt to ask with, where the policy has any.
      without: collections of tuners to leave out, such as `prompt`.
    """
    policy = policy.asked(soft_prompt=soft_prompt, without=without)
    if normalise not in NORMALISATIONS:
        raise LuthierError(f"unknown value {normalise!r}", where="normalise", mend=near(normalise, NORMALISATIONS))
    questions = [_question(*record) for record in read_records(data, limit)]
    cases = [case for case, _ in questions]
    pool = [_question(*record)[0] for record in read_records(shots_from)] if shots_from and shots else []
    prompts = few_shot(cases, pool or shot_pool(shots, shots_from), shots, seed)
    pairs = [{"prompt": p, "completion": option} for p, (_, options) in zip(prompts, questions) for option in options]
    scored = iter(score(policy, pairs, batch_size=batch_size))
    records, right = [], {name: [] for name in NORMALISATIONS}
    for case, options in questions:
        found = [next(scored) for _ in options]
        sizes = {
            "none": [1] * len(options),
            "tokens": [len(s.token_ids) for s in found],
            "bytes": [len(option.encode()) for option in options],
        }
        picks = {n: options[int(np.argmax([s.logprob / z for s, z in zip(found, sizes[n])]))] for n in NORMALISATIONS}
        for name, pick in picks.items():
            right[name].append(float(pick == case.answer))
        records.append(
            {
                "prompt": case.prompt,
                "expected": case.answer,
                "completion": picks[normalise],
                "score": right[normalise][-1],
                "logprobs": [s.logprob for s in found],
            }
        )
    metrics = {f"accuracy_{name}": float(np.mean(values)) for name, values in right.items()}
    metrics["chance"] = _chance(questions) if chance is None else chance
    interval = statistics.wilson(int(sum(right[normalise])), len(records))
    return EvalResult.of(label, "accuracy", interval, records, metrics, shots)


def _chance(questions: Sequence[tuple[Case, Sequence[str]]]) -> float:
    """The larger of guessing among the options and always giving the commonest answer."""
    answers = collections.Counter(case.answer for case, _ in questions)
    guessing = float(np.mean([1 / len(options) for _, options in questions]))
    return max(guessing, max(answers.values()) / len(questions))


def _question(record: Mapping, where: str) -> tuple[Case, Sequence[str]]:
    """The case of a multiple-choice record, its answer spelt out, and its options."""
    options = record.get("options", record.get("choices"))
    if not isinstance(options, Sequence) or isinstance(options, str) or len(options) < 2:
        raise LuthierError("no list of at least two `options`", where=where)
    break_ = "\n" if "input" in record and "prompt" not in record else ""
    prompt = record.get("prompt", record.get("input"))
    answer = next((record[key] for key in ("completion", "output", "answer") if key in record), None)
    if prompt is None or answer is None:
        raise LuthierError("a question needs `prompt` and `completion`, or `input` and `output`", where=where)
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        answer = answer[-1]["content"]
    if isinstance(answer, int) and 0 <= answer < len(options):
        answer = options[answer]
    if answer not in options:
        raise LuthierError(f"the answer {answer!r} is none of the options {list(options)}", where=where)
    prompt = prompt + break_ if isinstance(prompt, str) else tuple(prompt)
    return Case(prompt, answer, record, where), options


def perplexity(
    policy: Policy,
    *,
    label: str,
    data: str,
    format: str = "auto",
    train_on: str = "all",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    soft_prompt: int = 0,
    without: tuple = (),
) -> EvalResult:
    """exp of the mean negative log-likelihood a target token, over all targets.

    A text longer than the context is cut into windows that do not overlap; the end-of-text token
    counts, the first token does not.

    Args:
      data: records of any training format.
      format: name of the format (docs/data.md), or `auto`.
      train_on: which tokens are targets: `completion`, `assistant` or `all`.
      limit: read only the first so many.
      soft_prompt: number of the soft prompt to ask with, where the policy has any.
      without: collections of tuners to leave out, such as `prompt`.
    """
    policy = policy.asked(soft_prompt=soft_prompt, without=without)
    tokenized, places = read_tokens(policy, data, format=format, train_on=train_on, limit=limit)
    context = policy.bound.model.config.max_length - len(policy.prompt_slots)
    windows = [(number, start) for number, t in enumerate(tokenized) for start in range(0, len(t.ids) - 1, context)]
    pairs = [
        (tokenized[number].ids[start : start + 1], tokenized[number].ids[start + 1 : start + 1 + context])
        for number, start in windows
    ]
    nll, size, bytes_ = np.zeros((3, len(tokenized)))
    for (number, start), scored in zip(windows, score_tokens(policy, pairs, batch_size=batch_size)):
        target = tokenized[number].weights[start + 1 : start + 1 + context] > 0
        nll[number] -= np.asarray(scored.logprobs)[target].sum()
        size[number] += target.sum()
        bytes_[number] += len(policy.decode(np.asarray(scored.token_ids)[target]).encode())
    mean = statistics.ratio(nll, size, seed=seed)
    interval = statistics.Interval(*(math.exp(x) if x < 700 else math.inf for x in (mean.value, mean.low, mean.high)))
    metrics = {"nll": mean.value, "tokens": float(size.sum())}
    if bytes_.sum():
        metrics["bits_per_byte"] = float(nll.sum() / bytes_.sum() / math.log(2))
    records = [{"where": place, "nll": float(a), "tokens": int(b)} for place, a, b in zip(places, nll, size)]
    return EvalResult.of(label, "perplexity", interval, records, metrics)
