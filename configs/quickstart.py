"""The main job: SmolLM2-135M learns to add two signed two-digit numbers, in minutes on a laptop.

LoRA on every linear map, on 4,000 examples that share no problem with the 400 of the test file;
before training also few-shot prompting is measured, the fair rival. The weights are rounded to
4 bits (docs/models.md), and so is every number of this run.
"""

import pathlib

from luthier import config as c

TASK = pathlib.Path(__file__).parent / "tasks" / "chain_sum"
TRAIN, TEST = str(TASK / "train.jsonl"), str(TASK / "test.jsonl")


def evaluation(shots: int):
    """The first 200 held-out problems, `shots` solved examples before each."""
    return c.spec(
        "verifier",
        label=f"sums-{shots}-shot",
        data=TEST,
        verifier="first_integer",
        shots=shots,
        shots_from=TRAIN,
        limit=200,
        max_new_tokens=8,
    )


def get_config(source: str = "smollm2-135m"):
    return c.recipe(
        name="quickstart",
        model=c.model(source),
        stages=(
            c.stage(
                data=c.data(TRAIN),
                steps=60,
                batch_size=4,
                sequence_length=256,
                tuners=(c.spec("lora", rank=16, alpha=32.0),),
                schedule=c.spec("cosine", peak=2e-3, warmup=0.05),
            ),
        ),
        evaluations=(evaluation(0),),
        baselines=(evaluation(4), evaluation(8)),
        checkpoint=c.checkpoint(every=20),
    )
