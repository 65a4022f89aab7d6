"""Writes train.jsonl and test.jsonl: sums of two signed two-digit integers, as text records.

A problem is `a + b` or `a - b` with a of either sign and b positive. In four of five both terms
carry the same sign: opposite signs ask for a subtraction, which takes a small model many more steps
to learn than a quickstart has. The task is in the manner of chain_sum in reasoning-gym (Apache-2.0),
the wording is ours. No problem occurs twice, in a file or over both. Run again, it writes the same.
"""

import json
import pathlib
import random

TRAIN, TEST = 4000, 400
SAME_SIGN = 0.8
PROMPT, COMPLETION = "Compute {first} {sign} {second} =", " {answer}"


def problems(count: int, seed: int) -> list[tuple[int, str, int]]:
    """`count` different problems (first term, sign, second term) in random order."""
    draw = random.Random(seed)
    signs = {True: [(1, "+"), (-1, "-")], False: [(1, "-"), (-1, "+")]}
    found: dict[tuple[int, str, int], None] = {}
    while len(found) < count:
        sign_of_first, sign = draw.choice(signs[draw.random() < SAME_SIGN])
        found[sign_of_first * draw.randint(10, 99), sign, draw.randint(10, 99)] = None
    return list(found)


def record(first: int, sign: str, second: int) -> dict[str, str]:
    answer = first + second if sign == "+" else first - second
    return {
        "prompt": PROMPT.format(first=first, sign=sign, second=second),
        "completion": COMPLETION.format(answer=answer),
    }


def main() -> None:
    drawn = [record(*problem) for problem in problems(TRAIN + TEST, seed=0)]
    for name, part in {"train": drawn[:TRAIN], "test": drawn[TRAIN:]}.items():
        path = pathlib.Path(__file__).parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in part))


if __name__ == "__main__":
    main()
