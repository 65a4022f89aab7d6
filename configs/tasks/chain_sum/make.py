"""Writes train.jsonl and test.jsonl: sums of two signed two-digit integers, as text records.

And of the first problems of train.jsonl pairs.jsonl (a right and a wrong answer), labels.jsonl (one answer and whether
it is right) and ranked.jsonl (four answers, the nearer the better; the right one has score 1), with the mistakes that
adding goes wrong by; pairs_test.jsonl has pairs of test.jsonl's problems.

A problem is `a + b` or `a - b` with a of either sign and b positive. In four of five both terms
carry the same sign: opposite signs ask for a subtraction, which takes a small model many more steps
to learn than a quickstart has. The task is in the manner of chain_sum in reasoning-gym (Apache-2.0),
the wording is ours. No problem occurs twice, in a file or over both. Run again, it writes the same.
"""

import json
import pathlib
import random

TRAIN, TEST, COMPARED = 4000, 400, 1000
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


def mistakes(first: int, sign: str, second: int, draw: random.Random) -> list[int]:
    """Three different wrong answers: another sign, a carry forgotten or made, and a slip."""
    right = first + second if sign == "+" else first - second
    other = first - second if sign == "+" else first + second
    near = [right + step for step in (-10, 10, -1, 1) if right + step != other]
    return draw.sample([other, *draw.sample(near, 2)], 3)


def compared(problem: tuple[int, str, int], draw: random.Random) -> tuple[dict, dict, dict]:
    """A problem as a pair, as a labelled answer and as ranked answers."""
    solved, wrong = record(*problem), mistakes(*problem, draw)
    prompt, right = solved["prompt"], solved["completion"]
    answers = [int(right), *wrong]
    draw.shuffle(answers)
    text = lambda answer: COMPLETION.format(answer=answer)  # noqa: E731
    is_right = draw.random() < 0.5
    return (
        {"prompt": prompt, "chosen": right, "rejected": text(wrong[0])},
        {"prompt": prompt, "completion": right if is_right else text(wrong[0]), "label": is_right},
        {
            "prompt": prompt,
            "completions": [text(answer) for answer in answers],
            "scores": [(10 - abs(answer - int(right))) / 10 for answer in answers],  # some losses read their sign
        },
    )


def main() -> None:
    found, draw = problems(TRAIN + TEST, seed=0), random.Random(1)
    drawn = [record(*problem) for problem in found]
    parts = {"train": drawn[:TRAIN], "test": drawn[TRAIN:]}
    parts |= zip(("pairs", "labels", "ranked"), zip(*(compared(problem, draw) for problem in found[:COMPARED])))
    draw = random.Random(2)
    parts["pairs_test"] = [compared(problem, draw)[0] for problem in found[TRAIN:]]
    for name, part in parts.items():
        path = pathlib.Path(__file__).parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in part))


if __name__ == "__main__":
    main()
