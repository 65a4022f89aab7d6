"""Records → cases to ask a policy: a prompt, what is expected, and solved examples before it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.data.demonstrations import after_solved
from luthier.data.records import Chat, Format, Text, prompt_of
from luthier.data.sources import open_source
from luthier.data.tokenize import Tokens, tokenize
from luthier.decoding.policy import Policy, Prompt
from luthier.errors import LuthierError


@dataclasses.dataclass(frozen=True)
class Case:
    """One example to be answered.

    Attributes:
      prompt: text, or chat messages up to the answer.
      answer: the expected text; None where the record has none.
      record: the data record.
      where: file:line.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    answer: str | None
    record: Mapping[str, Any]
    where: str

    def solved(self) -> str | tuple[Mapping[str, Any], ...]:
        """The prompt with its answer, in the form of a training example."""
        if isinstance(self.prompt, str):
            return self.prompt + self.answer
        return (*self.prompt, {"role": "assistant", "content": self.answer})


def read_records(data: str, limit: int | None = None) -> list[tuple[Mapping[str, Any], str]]:
    """The records of a source, each with its file:line."""
    source = open_source(data, limit=limit)
    return [(source[i], source.where(i)) for i in range(len(source))]


def read_tokens(
    policy: Policy, data: str, *, format: str, train_on: str, limit: int | None
) -> tuple[list[Tokens], list[str]]:
    """The records of a source as the policy would be trained on them, and the file:line of each.

    Args:
      data: records of any training format.
      format: name of the format (docs/data.md), or `auto`.
      train_on: which tokens are targets: `completion`, `assistant` or `all`.
      limit: read only the first so many.
    """
    form, found = Format(format), read_records(data, limit)
    examples, places = [form.told(*one).read(*one) for one in found], [where for _, where in found]
    tokens = tokenize(examples, places, tokenizer=policy.tokenizer, template=policy.template, train_on=train_on)
    return tokens, places


def read_cases(data: str | Mapping[str, Any], limit: int | None = None) -> list[Case]:
    """The cases of a source: a path, or a `data(...)` section with its format and columns.

    Records are training examples whose last answer is expected, or have only a `prompt`.
    """
    section = {"source": data} if isinstance(data, str) else dict(data)
    found = read_records(section["source"], limit if limit is not None else section.get("limit"))
    form = Format(section.get("format", "auto"), section.get("columns") or {}, section.get("roles") or {})
    return [_case(record, form, where) for record, where in found]


def _case(record: Mapping[str, Any], form: Format, where: str) -> Case:
    named = {key: record[theirs] for key, theirs in form.columns.items() if theirs in record} or record
    if "prompt" in named and "completion" not in named:
        return Case(prompt_of(form, named, where), None, record, where)
    example = form.told(record, where).read(record, where)
    if isinstance(example, Text) and len(example.segments) == 2:
        prompt, answer = (segment.text for segment in example.segments)
        return Case(prompt, answer, record, where)
    if isinstance(example, Chat):
        before, after = example.messages[: example.prompt_turns], example.messages[example.prompt_turns :]
        return Case(before, str(after[-1]["content"]), record, where)
    raise LuthierError(
        "the record has no prompt to ask", where=where, mend='Write {"prompt": …, "completion": …} or messages'
    )


def few_shot(cases: Sequence[Case], pool: Sequence[Case], shots: int, seed: int) -> list[Prompt]:
    """Each case's prompt after `shots` solved examples drawn from `pool`.

    The draw depends on (seed, index of the case); an example with the prompt of the case itself is
    never drawn. Text is joined by a blank line; chats become earlier turns after the system message.
    """
    drawn = [_drawn(case, pool, shots, (seed, i)) for i, case in enumerate(cases)]
    return [
        after_solved([shot.solved() for shot in before], case.prompt, case.where) for case, before in zip(cases, drawn)
    ]


def shot_pool(shots: int, shots_from: str | None) -> list[Case]:
    """The cases that solved examples are drawn from."""
    if not shots:
        return []
    if not shots_from:
        raise LuthierError(f"shots={shots} needs a source of solved examples", where="shots_from", mend="Name a file")
    return [case for case in read_cases(shots_from) if case.answer is not None]


def _drawn(case: Case, pool: Sequence[Case], shots: int, key: tuple[int, int]) -> list[Case]:
    if not shots:
        return []
    drawn = np.random.default_rng(key).permutation(len(pool))
    others = [pool[i] for i in drawn[: shots + 1] if pool[i].prompt != case.prompt]
    if len(others) < shots:  # the pool repeats itself
        others = [pool[i] for i in drawn if pool[i].prompt != case.prompt]
    if len(others) < shots:
        raise LuthierError(
            f"{shots} solved examples are asked for and {len(others)} are there", where="shots_from", mend="Lower shots"
        )
    return others[:shots]
