"""Shipped recipes on SmolLM2-135M: ProMoT, one-token rollout, preferences; everyday few-shot tasks before and after.

    PYTHONPATH=benchmarks/studies python -m smollm2 FOLDER --study=promot_smollm2

A step takes seconds on two cores, so there is one rate a method, the one that the laboratory chose, and no tuning. The
SFT that comes before preferences is run once, and all cells begin with its model.
"""

import argparse
import functools
import pathlib
import random
import runpy

import everyday
import harness
import page
import preference

from luthier import config as c
from luthier import train

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RECIPES = {
    "promot_smollm2": "promot.py",
    "one_token_rollout_smollm2": "one_token_rollout.py",
    "preference_smollm2": "preference.py",
}
CHANGES = {"one_token_rollout_smollm2": ("stages[0].steps=60", "stages[0].batch_size=4")}
# A method that is not a choice of its recipe: the choice that it is made of, and what differs.
VARIANTS = {"otr+0.1": ("mc", ("stages[0].objective.beta=0.1",))}


def recipe(folder: pathlib.Path, plan: harness.Plan, cell: harness.Cell):
    choice, variant = VARIANTS.get(cell.method, (cell.method, ()))
    changes = [*CHANGES.get(plan.name, ()), *variant, f"seed={cell.seed}"]
    made = c.load(f"{CONFIGS / RECIPES[plan.name]}:{choice}", changes)
    with made.unlocked(), made.stages[-1].schedule.unlocked():
        made.name = cell.name
        made.stages[-1].schedule.peak = cell.rate
        made.evaluations += everyday.evaluations(folder.parent / "everyday", apart=("prompt",))
        made.checkpoint = c.checkpoint(every=20)
        if plan.name == "preference_smollm2":
            made.model = c.model(str(folder / "start" / "final"))
            made.stages = made.stages[1:]
            made.evaluations += preference.likelihoods(folder)
    return made


def prepare_preference(folder: pathlib.Path) -> None:
    """Makes the model that every cell of the study begins with, and either side of pairs of the task's test."""
    if not (folder / "rejected.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        task = runpy.run_path(str(CONFIGS / "tasks" / "chain_sum" / "make.py"))
        held_out = task["problems"](task["TRAIN"] + task["TEST"], seed=0)[task["TRAIN"] :]
        draw = random.Random(2)
        preference.write_sides(folder, [task["compared"](problem, draw)[0] for problem in held_out])
    first = c.load(str(CONFIGS / RECIPES["preference_smollm2"]))
    with first.unlocked():
        first.name, first.stages, first.evaluations = "start", first.stages[:1], ()
    train(first, folder / "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--study", required=True, choices=RECIPES)
    chosen = parser.parse_args()
    everyday.write(chosen.folder / "everyday")
    plan, folder = harness.read_plan(chosen.study), chosen.folder / chosen.study
    further = None
    if plan.name == "preference_smollm2":
        prepare_preference(folder)
        further = functools.partial(preference.further, target="sums")
    results = harness.run_study(plan, functools.partial(recipe, folder, plan), folder, further=further)
    print(page.write_page(plan, results))


if __name__ == "__main__":
    main()
