"""Writes train.jsonl and test.jsonl: sums of two signed two-digit integers, as text records.

A problem is `a + b` or `a - b` with a of either sign and b positive, all digits drawn evenly; the
task is in the manner of chain_sum in reasoning-gym (Apache-2.0), the wording is ours. Problems do
not repeat, within a file or between the two. Run it again and the files are the same.
"""

import json
import pathlib
import random

TRAIN, TEST = 4000, 400
PROMPT, COMPLETION = "Compute {first} {sign} {second} =", " {answer}"


def problems(count: int, seed: int) -> list[tuple[int, str, int]]:
    """`count` different problems (first term, sign, second term)."""
    every = [
        (sign_of_first * first, sign, second)
        for first in range(10, 100)
        for sign_of_first in (1, -1)
        for sign in "+-"
        for second in range(10, 100)
    ]
    return random.Random(seed).sample(every, count)


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
