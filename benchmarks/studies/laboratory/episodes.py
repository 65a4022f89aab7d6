"""Episodes of pretraining, and the problems that evaluations ask: pure functions of a seed."""

import collections
import math
import random
import re
from collections.abc import Iterator

from laboratory.formats import HELD_OUT, Format, open_formats, trained_formats
from laboratory.language import vocabulary
from laboratory.tasks import FAMILIES, HELD_OUT_FAMILIES, Answer, Groups, Task

SEPARATOR = "\n\n"  # between solved examples, as in luthier.evals.cases
LONGEST = 256  # tokens of an episode
FORMATS = 3000
INPUT, FORMAT, ANSWER = 0, 1, 2
# Tasks whose hidden part is new in every episode come more often: only the context helps there.
WEIGHTS = {"choose_category": 4.0, "lookup": 2.0, "add_constant": 2.0}

_IDS = {word: i for i, word in enumerate(vocabulary())}
Problem = tuple[Groups, Answer]


def encode(text: str) -> list[int]:
    """Token ids of a text of the language, nothing added."""
    return [_IDS[word] for word in re.findall(r"\n+|[^ \n]+", text)]


def problems(task: Task, rng: random.Random, count: int) -> list[Problem]:
    """Up to `count` problems with different inputs; fewer where the task has no more."""
    found: dict[Groups, Answer] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        groups = task.draw(rng)
        found.setdefault(groups, task.solve(groups))
    return list(found.items())


def episode(task: Task, form: Format, examples: list[Problem]) -> tuple[list[int], list[int]]:
    """Token ids from `<s>` to `</s>`, and of each whether it is INPUT, FORMAT or ANSWER (with what ends it).

    All but INPUT are targets: every answer, so an episode of n examples trains 0 to n − 1 shots, and the words of the
    format, which are there to be copied from the second example on (before, nothing tells them: they count as INPUT).
    Examples that would make an episode longer than LONGEST are left out.
    """
    ids, kinds = [_IDS["<s>"]], [INPUT]
    for number, (groups, answer) in enumerate(examples):
        before, given, after = (encode(part) for part in form.parts(groups, task.instruction))
        completion = [*encode(form.completion(answer)), _IDS[SEPARATOR]]
        if len(ids) + len(before) + len(given) + len(after) + len(completion) > LONGEST:
            break
        ids += [*before, *given, *after, *completion]
        told = FORMAT if number else INPUT
        kinds += [told] * len(before) + [INPUT] * len(given) + [told] * len(after) + [ANSWER] * len(completion)
    return [*ids[:-1], _IDS["</s>"]], kinds


def episodes(count: int, seed: int, open_share: float = 0.0) -> Iterator[tuple[list[int], list[int]]]:
    """Episodes of pretraining: one task, one format, one to ten examples. Episode i depends on (seed, i) alone.

    Args:
      open_share: how many have an open format.
    """
    formats = trained_formats(FORMATS, seed=0)
    others = open_formats(count, seed=0) if open_share else ()
    names = list(FAMILIES)
    weights = [WEIGHTS.get(name, 1.0) for name in names]
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        task = FAMILIES[rng.choices(names, weights)[0]](rng)
        form = rng.choice(others if others and rng.random() < open_share else formats)
        yield episode(task, form, problems(task, rng, rng.randint(1, 10)))


def gate_questions(format_name: str, shots: int, count: int, seed: int = 1) -> list[dict]:
    """Questions on tasks of pretraining in a held-out format, `shots` solved examples in each prompt.

    The questions of a format are the same whatever `shots` is.
    """
    form, records = HELD_OUT[format_name], []
    for i in range(count):
        rng = random.Random(f"{seed} {format_name} {i}")
        task = FAMILIES[rng.choice(list(FAMILIES))](rng)
        (query, answer), *solved = problems(task, rng, 9)
        parts = [form.prompt(groups) + form.completion(its) for groups, its in solved[:shots]]
        prompt = SEPARATOR.join([*parts, form.prompt(query)])
        records.append({"prompt": prompt, "completion": form.completion(answer), "family": task.name})
    return records


def records(name: str, form: Format, count: int, seed: int, labels: tuple[str, ...] = ()) -> list[dict]:
    """Different problems of one family in one format, with `options` where the answers are few.

    Args:
      labels: for a family of classes, what they are called.
    """
    task, rng = _fixed(name, seed, labels)
    found = []
    for groups, answer in problems(task, rng, count):
        record = {"prompt": form.prompt(groups, task.instruction), "completion": form.completion(answer)}
        options = {"options": [form.completion(option) for option in task.options]} if task.options else {}
        found.append(record | options)
    return found


def chance(name: str, count: int, seed: int, labels: tuple[str, ...] = ()) -> float:
    """Accuracy on the `records` of the best answer that ignores what is asked.

    It names a class, or always the commonest answer, or as many of the listed words of the answer's kind (numbers, or
    others) as the answer has, in any order.
    """
    task, rng = _fixed(name, seed, labels)
    found = problems(task, rng, count)
    if task.options:
        return 1 / len(task.options)
    drawn = 0.0
    for groups, answer in found:
        kinds, wanted = {word.isdigit() for word in answer}, set(answer)
        alike = {word for word in groups[0] if word.isdigit() in kinds}
        drawn += wanted <= alike and 1 / math.perm(len(alike), len(wanted))
    commonest = max(collections.Counter(answer for _, answer in found).values())
    return max(drawn, commonest) / len(found)


def _fixed(name: str, seed: int, labels: tuple[str, ...]) -> tuple[Task, random.Random]:
    rng = random.Random(f"{seed} {name}")
    family = {**FAMILIES, **HELD_OUT_FAMILIES}[name]
    return (family.labelled(labels) if labels else family)(rng), rng
