"""The smallest study, on a random model of the laboratory's language: that the harness works.

PYTHONPATH=benchmarks/studies python -m smoke runs/studies/smoke
"""

import argparse
import json
import pathlib

import harness
import page
from laboratory.episodes import records
from laboratory.formats import HELD_OUT
from laboratory.make import write_model

from luthier import config as c

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = 40


def write_data(folder: pathlib.Path) -> None:
    """A tiny random model, and copying in one format to learn and to be asked."""
    if (folder / "model" / "config.json").exists():
        return
    found = records("copy", HELD_OUT["tilde"], 400, seed=0)
    for name, part in {"train": found[:350], "test": found[350:]}.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    write_model(folder / "model", **TINY, num_key_value_heads=2)


def recipe(folder: pathlib.Path, cell: harness.Cell):
    tuners = (c.spec("lora", rank=1),) if cell.method == "lora" else ()
    asked = {"data": f"{folder}/test.jsonl", "verifier": "exact", "max_new_tokens": 8, "batch_size": 64}
    return c.recipe(
        name=cell.name,
        model=c.model(f"{folder}/model", remat="none"),
        stages=(
            c.stage(
                data=c.data(f"{folder}/train.jsonl"),
                steps=STEPS,
                batch_size=4,
                sequence_length=64,
                tuners=tuners,
                schedule=c.spec("cosine", peak=cell.rate),
            ),
        ),
        evaluations=(
            c.spec("verifier", label="copy", **asked, retention=True),
            c.spec("shift", label="moved", data=f"{folder}/test.jsonl", start=f"{folder}/model"),
        ),
        checkpoint=c.checkpoint(every=0),
        logging=c.logging(every=10, tensorboard=False),
        seed=cell.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path, help="folder of the page of results")
    chosen = parser.parse_args()
    plan = harness.read_plan("smoke")
    write_data(chosen.folder)
    results = harness.run_study(plan, lambda cell: recipe(chosen.folder, cell), chosen.folder)
    if chosen.page:
        print(page.write_page(plan, results, chosen.page))


if __name__ == "__main__":
    main()
