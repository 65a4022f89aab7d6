"""ProMoT (S146, arXiv 2211.00635) on the laboratory model: the prompt takes the format, does the model keep the rest?

    PYTHONPATH=benchmarks/studies python -m promot FOLDER [--study=promot] [--jobs=2]

`promot` teaches one task by every method of the paper's tables, `promot_slower` the same at lower rates,
`promot_tasks` two tasks at once and one after the other, and `promot_format` follows the gradients of plain
fine-tuning. Directions, rates and seeds: plans.yaml.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Sequence

import harness
import page
from laboratory import MODEL, suite

from luthier import config as c
from luthier.reporting.workdir import Evaluation

STUDIES = ("promot", "promot_slower", "promot_tasks", "promot_format")
TARGET, SECOND = "ordered", "translate"
ROWS, LENGTH = 2, 256
PROMPT_STEPS, STEPS = 100, 200
PROMPT_RATE = 0.3
APART = ("prompt", "first")  # what is trained in stage 1 stays with its task
PROMPT = c.spec("prompt_tuning", length=10)
FIRST_LORA = c.spec("lora", rank=4, alpha=8.0, collection="first")
SMOOTHED = c.spec("sft", label_smoothing=0.1)


def write_data(folder: pathlib.Path) -> None:
    """The suite's records, and the target's with answers that say nothing but the format."""
    if (folder / "shuffled.jsonl").exists():
        return
    suite.write(folder)
    records = [json.loads(line) for line in (folder / TARGET / "train.jsonl").read_text().splitlines()]
    answers = [record["completion"] for record in records]
    moved = [record | {"completion": other} for record, other in zip(records, answers[1:] + answers[:1])]
    (folder / "shuffled.jsonl").write_text("".join(json.dumps(record) + "\n" for record in moved))


def stages_of(method: str, rate: float, folder: pathlib.Path) -> tuple:
    """The stages of a method; `rate` is that of its last one."""
    data = lambda label=TARGET, **how: c.data(f"{folder}/{label}/train.jsonl", **how)  # noqa: E731
    prompt = functools.partial(_stage, name="prompt", steps=PROMPT_STEPS, tuners=(PROMPT,))
    adamw = c.spec("adamw")
    first_lora = functools.partial(_stage, name="first", steps=PROMPT_STEPS, tuners=(FIRST_LORA,), optimizer=adamw)
    model = functools.partial(_stage, rate, name="model", steps=STEPS, train=("params",))
    both, prompts = (data(), data(SECOND)), c.spec("prompt_tuning", length=10, prompts=2)
    own, untrained = (data(), data(SECOND, prompt=1)), c.spec("prompt_tuning", length=10, init="uniform")
    return {
        "full": lambda: (model(data()),),
        "full-1shot": lambda: (model(data(shots=1)),),
        "lora": lambda: (model(data(), tuners=(c.spec("lora", rank=8, alpha=16.0),), train=(), optimizer=adamw),),
        "prompt": lambda: (prompt(rate, data()),),
        "joint": lambda: (model(data(), tuners=(PROMPT,), train=("params", "prompt")),),
        "random": lambda: (model(data(), tuners=(untrained,)),),
        "random-fast": lambda: (model(data(), tuners=(untrained,)),),
        "lora-first": lambda: (first_lora(3e-3, data()), model(data(), tuners=(FIRST_LORA,))),
        "promot": lambda: (prompt(PROMPT_RATE, data()), model(data(), tuners=(PROMPT,))),
        "promot-1shot": lambda: (prompt(PROMPT_RATE, data()), model(data(shots=1), tuners=(PROMPT,))),
        "full-mixed": lambda: (model(both, steps=2 * STEPS),),
        "full-sequence": lambda: (model(both[0]), model(both[1], name="second")),
        "promot-mixed": lambda: (
            prompt(PROMPT_RATE, own, steps=2 * PROMPT_STEPS, tuners=(prompts,)),
            model(own, steps=2 * STEPS, tuners=(prompts,)),
        ),
        "promot-sequence": lambda: (
            prompt(PROMPT_RATE, own[0], tuners=(prompts,)),
            model(own[0], tuners=(prompts,)),
            prompt(PROMPT_RATE, own[1], name="second-prompt", tuners=(prompts,)),
            model(own[1], name="second", tuners=(prompts,)),
        ),
    }[method]()


def _stage(rate, data, *, name, steps, tuners=(), train=(), optimizer=None):
    is_model = "params" in train
    return c.stage(
        name=name,
        data=data,
        steps=steps,
        batch_size=ROWS,
        sequence_length=LENGTH,
        tuners=tuners,
        train=train,
        objective=SMOOTHED if is_model else c.spec("sft"),
        optimizer=optimizer or c.spec("adafactor", multiply_by_parameter_scale=is_model),
        schedule=c.spec("constant", peak=rate),
        clip_norm=0.0,
    )


def recipe(folder: pathlib.Path, plan: harness.Plan, cell: harness.Cell):
    records, steps = folder.parent / "records", 0
    if plan.name == "promot_format":
        asked, steps = (gradients(records),), 20
    elif cell.seed == plan.tune.get("seed"):
        asked = suite.evaluations(records, (TARGET,), part="dev")
    else:
        second = (SECOND,) if plan.name == "promot_tasks" else ()
        labels = (TARGET, *second, *suite.RETAINED)
        asked = suite.evaluations(records, labels, prompts={SECOND: 1}, apart=APART)
    stages = stages_of(cell.method, cell.rate, records)
    if steps:
        with stages[-1].unlocked():
            stages[-1].evaluate_every = steps
    return c.recipe(
        name=cell.name,
        model=c.model(str(MODEL), remat="none", dropout=0.1),
        stages=stages,
        evaluations=asked,
        checkpoint=c.checkpoint(every=0),
        logging=c.logging(every=10, tensorboard=False),
        seed=cell.seed,
    )


def gradients(records: pathlib.Path):
    """How alike the gradients of the task and of its format alone are."""
    return c.spec(
        "gradients:cosine",
        label="alike",
        data=f"{records}/{TARGET}/train.jsonl",
        other=f"{records}/shuffled.jsonl",
        limit=300,
    )


def further(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """How often another task is answered with the target's words, and cosines by kind of weight."""
    labels = suite.TARGETS[TARGET].labels
    found = {}
    for when in ("before", "after"):
        elsewhere = [r for e in evaluations if e.when == when and e.label in suite.RETAINED for r in e.records]
        if elsewhere:
            said = [record["completion"].strip() in labels for record in elsewhere]
            found[f"{when}-target-words"] = sum(said) / len(said)
    for evaluation in evaluations:
        if evaluation.label == "alike":
            kinds = evaluation.result["metrics"].items()
            found |= {f"{evaluation.when}-alike-{kind}": value for kind, value in kinds}
    alike = {e.when: e.value for e in evaluations if e.label == "alike"}
    return found | ({"alike-fall": alike["before"] - alike["after"]} if alike else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--study", default="promot", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each")
    chosen = parser.parse_args()
    write_data(chosen.folder / "records")
    plan, folder = harness.read_plan(chosen.study), chosen.folder / chosen.study
    cells = functools.partial(recipe, folder, plan)
    results = harness.run_study(plan, cells, folder, further=further, jobs=chosen.jobs)
    print(page.write_page(plan, results))


if __name__ == "__main__":
    main()
