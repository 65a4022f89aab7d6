"""Verifiers: pure functions (completion, record) → reward in [0, 1], found by name.

`record` is the whole data record, so a verifier may read any field; `answer_of` gives the text of
its `completion`. To add one, write a function and put it in `VERIFIERS`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from luthier.errors import LuthierError, near

Record = Mapping[str, Any]
Verifier = Callable[[str, Record], float]

# A minus counts as a sign where it touches the number and follows no other: -3, but 7-3 is 7 and 3.
_NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:\.\d+)?")


def has_answer(record: Record) -> bool:
    """Whether the record says what is expected."""
    return _answer(record) is not None


def answer_of(record: Record) -> str:
    """What the record expects: its `answer`, `ground_truth` (verl's too) or else the text of its `completion`."""
    value = _answer(record)
    if value is None:
        raise LuthierError(
            f"no expected answer among the keys {sorted(record)}",
            where="verifier",
            mend="Give each record a `completion` or an `answer`",
        )
    return str(value[-1]["content"]) if isinstance(value, (list, tuple)) else str(value)


def _answer(record: Record) -> Any:
    verl = record.get("reward_model")
    nested = verl.get("ground_truth") if isinstance(verl, Mapping) else None
    found = (record.get("answer"), record.get("ground_truth"), nested, record.get("completion"))
    return next((value for value in found if value is not None), None)


def exact(completion: str, record: Record) -> float:
    """1 if the texts are equal but for white space around them."""
    return float(completion.strip() == answer_of(record).strip())


def integer(completion: str, record: Record) -> float:
    """1 if the last integer of the first line of the completion with one is the record's last integer."""
    expected = _integers(answer_of(record))
    if not expected:
        raise LuthierError(f"the expected answer {answer_of(record)!r} has no integer", where="verifier 'integer'")
    lines = (found for line in completion.splitlines() if (found := _integers(line)))
    return float(next(lines, [None])[-1] == expected[-1])


def first_integer(completion: str, record: Record) -> float:
    """1 if the first integer of the completion is the record's last integer."""
    return float(_integers(completion)[:1] == _integers(answer_of(record))[-1:])


def regex(completion: str, record: Record) -> float:
    """1 if the record's `pattern` matches the whole completion, white space around it aside."""
    if "pattern" not in record:
        raise LuthierError("the record has no `pattern`", where="verifier 'regex'", mend="Add a regular expression")
    return float(re.fullmatch(record["pattern"], completion.strip()) is not None)


def contains(completion: str, record: Record) -> float:
    """1 if the expected answer occurs in the completion, whatever the case."""
    return float(answer_of(record).strip().lower() in completion.lower())


VERIFIERS: Mapping[str, Verifier] = {f.__name__: f for f in (exact, integer, first_integer, regex, contains)}


def find(name: str) -> Verifier:
    """The verifier called `name`."""
    if name not in VERIFIERS:
        raise LuthierError(f"unknown verifier {name!r}", where="verifier", mend=near(name, VERIFIERS))
    return VERIFIERS[name]


def _integers(text: str) -> list[int]:
    """The integers in reading order; 1,234 is one, 1.5 is none."""
    numbers = _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    return [int(number) for number in numbers if "." not in number]
