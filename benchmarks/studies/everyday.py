"""Few-shot tasks for a small pretrained model of English: what of them it can do, fine-tuning may destroy.

`write(folder)` makes FOLDER/LABEL/{test,shots}.jsonl; `evaluations` gives the specs of a recipe.
"""

import dataclasses
import itertools
import json
import pathlib
import random
from collections.abc import Callable, Iterator

from laboratory.language import CATEGORIES, WORDS

from luthier import config as c

TEST, SHOTS = 60, 4

CAPITALS = """
France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|Greece Athens|Austria Vienna
Poland Warsaw|Russia Moscow|Japan Tokyo|China Beijing|Egypt Cairo|Kenya Nairobi|Cuba Havana|Peru Lima
Chile Santiago|Iran Tehran|Iraq Baghdad|Norway Oslo|Sweden Stockholm|Denmark Copenhagen|Finland Helsinki
Ireland Dublin|Hungary Budapest|Ukraine Kyiv|Turkey Ankara|Thailand Bangkok|Vietnam Hanoi|Canada Ottawa
Belgium Brussels|Serbia Belgrade|Bulgaria Sofia|Romania Bucharest|Morocco Rabat|Syria Damascus
Lebanon Beirut|Jordan Amman|Nepal Kathmandu|Indonesia Jakarta|Philippines Manila
"""
OPPOSITES = """
hot cold|big small|up down|open closed|early late|fast slow|happy sad|high low|full empty|hard soft
light dark|old new|left right|rich poor|strong weak|wet dry|true false|loud quiet|near far|thick thin
first last|clean dirty|long short|day night|good bad|black white|in out|win lose|love hate|buy sell
push pull|start end|wide narrow|deep shallow|sweet sour|easy difficult|young old|inside outside|more less
before after
"""
PAST = """
walk walked|play played|look looked|jump jumped|talk talked|call called|work worked|clean cleaned
help helped|open opened|go went|see saw|eat ate|take took|make made|come came|give gave|run ran|find found
know knew|think thought|buy bought|tell told|write wrote|begin began|drink drank|sing sang|fly flew
drive drove|speak spoke|break broke|sleep slept|win won|sit sat|stand stood|keep kept|leave left|lose lost
send sent|build built
"""
ORDER = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
    "one two three four five six seven eight nine ten eleven twelve".split(),
    list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
)
DIGITS = "zero one two three four five six seven eight nine".split()

Problem = tuple[str, str]


def _pairs(text: str) -> Callable[[random.Random], Problem]:
    pairs = [tuple(pair.split()) for pair in text.strip().replace("\n", "|").split("|")]
    return lambda rng: rng.choice(pairs)


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(WORDS, count)


def _next(rng: random.Random) -> Problem:
    order = rng.choice(ORDER)
    place = rng.randrange(len(order) - 1)
    return order[place], order[place + 1]


def _chosen(count: int, place: int) -> Callable[[random.Random], Problem]:
    def draw(rng: random.Random) -> Problem:
        words = _words(rng, count)
        return ", ".join(words), words[place]

    return draw


def _copy(rng: random.Random) -> Problem:
    words = " ".join(_words(rng, 3))
    return words, words


def _category(rng: random.Random) -> Problem:
    name = rng.choice(list(CATEGORIES))
    return rng.choice(CATEGORIES[name]), name


def _number(rng: random.Random) -> Problem:
    digits = [rng.randrange(10) for _ in range(3)]
    return " ".join(DIGITS[d] for d in digits), "".join(map(str, digits))


def _longer(rng: random.Random) -> Problem:
    start, step = rng.randrange(1, 30), rng.randrange(1, 6)
    return ", ".join(str(start + i * step) for i in range(4)), str(start + 4 * step)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A task in one format: `layout` has `{x}`, and the answer follows after a blank."""

    draw: Callable[[random.Random], Problem]
    layout: str


TASKS = {
    "capital": Entry(_pairs(CAPITALS), "Country: {x}\nCapital:"),
    "opposite": Entry(_pairs(OPPOSITES), "Q: What is the opposite of {x}?\nA:"),
    "past": Entry(_pairs(PAST), "{x} ->"),
    "next": Entry(_next, "After {x} comes"),
    "copy": Entry(_copy, "Say: {x}\nSaid:"),
    "first": Entry(_chosen(3, 0), "List: {x}\nFirst word:"),
    "last": Entry(_chosen(3, -1), "[{x}] =>"),
    "category": Entry(_category, "{x} is a kind of"),
    "digits": Entry(_number, "Words: {x}\nDigits:"),
    "sequence": Entry(_longer, "Continue {x},"),
}


def problems(entry: Entry, seed: str) -> Iterator[Problem]:
    """Different problems, in random order, until there are no more."""
    rng, seen, misses = random.Random(seed), set(), 0
    while misses < 2000:
        problem = entry.draw(rng)
        misses = misses + 1 if problem in seen else 0
        if problem not in seen:
            seen.add(problem)
            yield problem


def write(folder: pathlib.Path, seed: int = 0) -> None:
    """Test questions and the examples to show; a task with few problems shows a quarter of them and asks the rest."""
    for label, entry in TASKS.items():
        drawn = itertools.islice(problems(entry, f"{seed} {label}"), 2 * TEST)
        found = [{"prompt": entry.layout.format(x=x), "completion": f" {y}"} for x, y in drawn]
        shown = min(len(found) // 4, TEST)
        (folder / label).mkdir(parents=True, exist_ok=True)
        for name, part in {"shots": found[:shown], "test": found[shown:][:TEST]}.items():
            (folder / label / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))


def evaluations(folder: str | pathlib.Path, *, apart: tuple[str, ...] = ()):
    """Specs that ask every task after SHOTS solved examples; `apart`: collections of tuners to leave out."""
    return tuple(
        c.spec(
            "verifier",
            label=label,
            data=f"{folder}/{label}/test.jsonl",
            verifier="exact",
            shots=SHOTS,
            shots_from=f"{folder}/{label}/shots.jsonl",
            limit=TEST,
            max_new_tokens=8,
            batch_size=25,
            retention=True,
            without=apart,
        )
        for label in TASKS
    )
