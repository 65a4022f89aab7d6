"""Solved examples before an example's prompt, as in few-shot prompting: ProMoT's "+1-shot", k-shot training."""

from collections.abc import Sequence

import numpy as np

from luthier.data.records import Chat, Example, Segment, Text
from luthier.errors import LuthierError

SEPARATOR = "\n\n"


def drawn(index: int, size: int, shots: int) -> list[int]:
    """Which other examples of `size` go before example `index`: always the same ones.

    Raises:
      LuthierError: if there are too few.
    """
    if shots >= size:
        raise LuthierError(f"{shots} demonstrations of {size} examples, of which one is asked", where="data.shots")
    others = np.random.default_rng((index, shots)).choice(size - 1, shots, replace=False)
    return [int(other + (other >= index)) for other in others]


def with_demonstrations(example: Example, demonstrations: Sequence[Example], where: str) -> Example:
    """The example whose prompt has the demonstrations, answers included, before it.

    Texts are joined by a blank line; of chats the turns come earlier, after the system message.
    """
    kinds = {type(one) for one in (example, *demonstrations)}
    if kinds == {Text} and all(len(one.segments) == 2 for one in (example, *demonstrations)):
        before = ["".join(segment.text for segment in one.segments) for one in demonstrations]
        prompt, completion = example.segments
        return Text((Segment(prompt.role, SEPARATOR.join([*before, prompt.text])), completion))
    if kinds == {Chat}:
        system = [message for message in example.messages[:1] if message["role"] in ("system", "developer")]
        turns = [m for one in demonstrations for m in one.messages if m["role"] not in ("system", "developer")]
        messages = (*system, *turns, *example.messages[len(system) :])
        return Chat(messages, example.prompt_turns + len(turns), example.tools, example.template_kwargs)
    raise LuthierError(
        "demonstrations need prompt/completion records or chats, of one kind", where=where, mend="Set data.shots=0"
    )
