"""Records → cases to ask a policy: a prompt, what is expected, and solved examples before it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.data.demonstrations import SEPARATOR
from luthier.data.records import Chat, Format, Text
from luthier.data.sources import open_source
from luthier.decoding.policy import Prompt
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

    def solved(self, answer: str) -> str | tuple[Mapping[str, Any], ...]:
        """The prompt with an answer, in the form of a training example."""
        if isinstance(self.prompt, str):
            return self.prompt + answer
        return (*self.prompt, {"role": "assistant", "content": answer})


def read_cases(data: str | Mapping[str, Any], limit: int | None = None) -> list[Case]:
    """The cases of a source: a path, or a `data(...)` section with its format and columns.

    Records are training examples whose last answer is expected, or have only a `prompt`.
    """
    section = {"source": data} if isinstance(data, str) else dict(data)
    source = open_source(section["source"], limit=limit if limit is not None else section.get("limit"))
    form = Format(section.get("format", "auto"), section.get("columns") or {}, section.get("roles") or {})
    return [_case(source[i], form, source.where(i)) for i in range(len(source))]


def _case(record: Mapping[str, Any], form: Format, where: str) -> Case:
    named = {key: record[theirs] for key, theirs in form.columns.items() if theirs in record} or record
    if "prompt" in named and "completion" not in named:
        prompt = named["prompt"]
        return Case(prompt if isinstance(prompt, str) else form.messages(prompt, where, "prompt"), None, record, where)
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
    return [_with_shots(case, _drawn(case, pool, shots, (seed, i))) for i, case in enumerate(cases)]


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


def _with_shots(case: Case, shots: Sequence[Case]) -> Prompt:
    kinds = {isinstance(c.prompt, str) for c in (case, *shots)}
    if len(kinds) > 1:
        raise LuthierError("shots are chats and the case is text, or the other way round", where=case.where)
    if isinstance(case.prompt, str):
        return SEPARATOR.join([*(shot.solved(shot.answer) for shot in shots), case.prompt])
    system = [message for message in case.prompt[:1] if message["role"] in ("system", "developer")]
    earlier = [m for shot in shots for m in shot.solved(shot.answer) if m["role"] not in ("system", "developer")]
    return [*system, *earlier, *case.prompt[len(system) :]]
