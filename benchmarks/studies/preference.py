"""Preference losses on the laboratory model: what becomes of both answers' likelihood, of the task and of the rest?

    PYTHONPATH=benchmarks/studies python -m preference FOLDER [--jobs=2]

A model that some steps of SFT taught to name the word that does not belong compares right answers with wrong ones,
another word of the same list. Only the loss differs, and the learning rate, chosen for each. Directions, rates and
seeds: plans.yaml.
"""

import argparse
import functools
import json
import math
import pathlib
import random
from collections.abc import Sequence

import harness
import page
from laboratory import MODEL, episodes, suite

from luthier import config as c
from luthier import train
from luthier.reporting.workdir import Evaluation

TARGET, NEAR = "odd", "outlier"
SFT_STEPS, STEPS, ROWS, LENGTH = 100, 100, 2, 256
PAIRS = 2000
OBJECTIVES = {
    "sft": c.spec("chosen_sft"),
    **{
        name: c.spec(name)
        for name in ("dpo", "ipo", "exo", "nca", "apo_zero", "apo_down", "orpo", "cpo", "simpo", "kto")
    },
}


def write_data(folder: pathlib.Path) -> None:
    """The suite's records, pairs of new problems of the target, and either side of the pairs of its test."""
    if (folder / "rejected.jsonl").exists():
        return
    suite.write(folder)
    entry, known = suite.TARGETS[TARGET], suite.TEST + suite.DEV + suite.TRAIN
    found = episodes.records(entry.family, entry.form, known + PAIRS, seed=0)
    _write(folder / "pairs.jsonl", _pairs(found[known:]))
    held_out = _pairs(found[: suite.TEST])
    _write(folder / "pairs-test.jsonl", held_out)
    write_sides(folder, held_out)


def write_sides(folder: pathlib.Path, pairs: Sequence[dict]) -> None:
    """FOLDER/chosen.jsonl and FOLDER/rejected.jsonl: the pairs' prompts with either answer."""
    for side in ("chosen", "rejected"):
        _write(folder / f"{side}.jsonl", [{"prompt": pair["prompt"], "completion": pair[side]} for pair in pairs])


def _write(file: pathlib.Path, records: Sequence[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _pairs(records: Sequence[dict]) -> list[dict]:
    """The right answer beside another word of the list."""
    draw = random.Random(0)
    made = []
    for record in records:
        words = record["prompt"].partition("input : ")[2].partition(" output")[0].split(" ")
        wrong = draw.choice([word for word in words if word != record["completion"].strip()])
        made.append({"prompt": record["prompt"], "chosen": record["completion"], "rejected": f" {wrong}"})
    return made


def start(folder: pathlib.Path) -> pathlib.Path:
    """The model that every cell begins with, made by SFT unless it was."""
    stage = c.stage(
        data=c.data(f"{folder.parent}/records/{TARGET}/train.jsonl"),
        steps=SFT_STEPS,
        batch_size=ROWS,
        sequence_length=LENGTH,
        schedule=c.spec("cosine", peak=1e-3, warmup=0.05),
    )
    train(c.recipe(name="start", model=c.model(str(MODEL), remat="none"), stages=(stage,)), folder / "start")
    return folder / "start" / "final"


def recipe(folder: pathlib.Path, plan: harness.Plan, cell: harness.Cell):
    records = folder.parent / "records"
    if cell.seed == plan.tune["seed"]:
        asked = suite.evaluations(records, (TARGET,), part="dev")
    else:
        kept = (label for label in suite.RETAINED if label != NEAR)
        asked = suite.evaluations(records, (TARGET, "odd-of-five", *kept))
        asked += (*likelihoods(records), c.spec("preferences", label="pairs", data=f"{records}/pairs-test.jsonl"))
    return c.recipe(
        name=cell.name,
        model=c.model(str(folder / "start" / "final"), remat="none"),
        stages=(
            c.stage(
                name="preference",
                data=c.data(f"{records}/pairs.jsonl"),
                steps=STEPS,
                batch_size=ROWS,
                sequence_length=LENGTH,
                objective=OBJECTIVES[cell.method],
                schedule=c.spec("cosine", peak=cell.rate, warmup=0.1),
                cache_reference=cell.method not in ("sft", "orpo", "cpo", "simpo"),
            ),
        ),
        evaluations=asked,
        checkpoint=c.checkpoint(every=0),
        logging=c.logging(every=10, tensorboard=False),
        seed=cell.seed,
    )


def likelihoods(folder: pathlib.Path):
    """Specs that measure how likely either answer is."""
    return tuple(
        c.spec("perplexity", label=side, data=f"{folder}/{side}.jsonl", train_on="completion")
        for side in ("chosen", "rejected")
    )


def further(evaluations: Sequence[Evaluation], *, target: str = TARGET) -> dict[str, float]:
    """How the mean log-probability of a token of either answer rose or fell (nats), and wins over the start."""
    found = {(e.when, e.label): e for e in evaluations}
    measures = {}
    for side in ("chosen", "rejected"):
        if ("after", side) in found:
            rise = math.log(found["before", side].value / found["after", side].value)
            measures |= {f"{side}-rise": rise, f"{side}-fall": -rise}
    before, after = (
        [record["score"] for record in found[when, target].records] if (when, target) in found else []
        for when in ("before", "after")
    )
    wins, losses = (sum(x > y for x, y in zip(*both)) for both in ((after, before), (before, after)))
    return measures | ({"win-rate": wins / (wins + losses)} if wins + losses else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each")
    chosen = parser.parse_args()
    write_data(chosen.folder / "records")
    plan, folder = harness.read_plan("preference"), chosen.folder / "preference"
    start(folder)
    cells = functools.partial(recipe, folder, plan)
    results = harness.run_study(plan, cells, folder, further=further, jobs=chosen.jobs)
    print(page.write_page(plan, results))


if __name__ == "__main__":
    main()
