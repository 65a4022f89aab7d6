"""Reward models on the quickstart's task: LoRA and a head that gives one number (docs/preference.md).

`--config=configs/reward.py:NAME` with NAME a key of `OBJECTIVES`; `bradley_terry` where none is given.
`preference_pretraining` is followed by a stage of Bradley–Terry, as in its paper. Held-out pairs are asked afterwards.
`final/` is a directory of transformers' sequence classifiers; `luthier score --reward --model=WORKDIR` asks it.
"""

import pathlib

from luthier import config as c

TASK = pathlib.Path(__file__).parent / "tasks" / "chain_sum"
# What is minimised, and the records.
OBJECTIVES = {
    "bradley_terry": (c.spec("bradley_terry", centring=0.01), "pairs"),
    "binary_discrimination": (c.spec("binary_discrimination"), "labels"),
    "ranking": (c.spec("ranking"), "ranked"),
    "preference_pretraining": (c.spec("preference_pretraining"), "pairs"),
}


def get_config(loss: str = "bradley_terry"):
    names = ("preference_pretraining", "bradley_terry") if loss == "preference_pretraining" else (loss,)
    return c.recipe(
        name=f"reward-{loss}",
        model=c.model("smollm2-135m"),
        stages=tuple(_stage(name) for name in names),
        evaluations=(c.spec("preferences", label="held-out", data=str(TASK / "pairs_test.jsonl"), limit=200),),
        checkpoint=c.checkpoint(every=20),
    )


def _stage(loss: str):
    objective, records = OBJECTIVES[loss]
    return c.stage(
        name=loss,
        data=c.data(str(TASK / f"{records}.jsonl"), answers=4 if records == "ranked" else 2),
        steps=40,
        batch_size=4,
        sequence_length=256,
        tuners=(c.spec("lora", rank=16, alpha=32.0), c.spec("reward_head")),
        objective=objective,
        schedule=c.spec("cosine", peak=1e-3, warmup=0.1),
    )
