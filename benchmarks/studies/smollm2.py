"""Shipped recipes on SmolLM2-135M: ProMoT, one-token rollout, preferences; everyday few-shot tasks before and after.

    PYTHONPATH=benchmarks/studies python -m smollm2 FOLDER --study=promot_smollm2

A step takes seconds on two cores, so a method has one rate and is not tuned; plans.yaml says where a rate is from. The
SFT that comes before preferences is run once, and all cells begin with its model.
"""

import argparse
import functools
import json
import pathlib

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
# By study, or by study and method. A soft prompt takes 20 of some 34 positions of an example: with 8 rows ProMoT's
# second stage sees about 30 examples a step, and full fine-tuning with 4 about 36.
CHANGES = {
    "one_token_rollout_smollm2": ("stages[0].steps=60", "stages[0].batch_size=2"),
    ("promot_smollm2", "full"): ("stages[0].batch_size=4", "stages[0].steps=90"),
    ("promot_smollm2", "promot"): ("stages[0].batch_size=4", "stages[1].steps=90"),
}
# A method that is not a choice of its recipe: the choice that it is made of, and what differs.
VARIANTS = {"otr+0.1": ("mc", ("stages[0].objective.beta=0.1",)), "otr-0.1": ("mc", ())}


def recipe(folder: pathlib.Path, plan: harness.Plan, cell: harness.Cell):
    choice, variant = VARIANTS.get(cell.method, (cell.method, ()))
    changes = [*CHANGES.get(plan.name, ()), *CHANGES.get((plan.name, cell.method), ()), *variant, f"seed={cell.seed}"]
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
        preference.write_sides(folder, list(map(json.loads, (CONFIGS / "tasks/chain_sum/pairs_test.jsonl").open())))
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
