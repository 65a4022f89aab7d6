"""Preference losses on the quickstart's task: some steps of SFT, then answers compared (docs/preference.md).

`--config=configs/preference.py:NAME` with NAME a key of `OBJECTIVES`; `dpo` where none is given. The reference is the
model that SFT made. Everything but the objective and the records it reads is equal.
"""

import pathlib

from luthier import config as c

TASK = pathlib.Path(__file__).parent / "tasks" / "chain_sum"
_OF_PAIRS = (
    *("dpo", "hinge", "ipo", "exo", "robust", "nca", "bco", "sppo", "apo_zero", "apo_down", "spin", "discopop"),
    *("sigmoid_norm", "aot", "aot_unpaired", "orpo", "cpo", "simpo", "alphapo", "chosen_sft"),
)
# What is minimised, and the records.
OBJECTIVES = {name: (c.spec(name), "pairs") for name in _OF_PAIRS} | {
    "cdpo": (c.spec("dpo", label_smoothing=0.1), "pairs"),
    "f_dpo": (c.spec("dpo", divergence="js"), "pairs"),
    "ld_dpo": (c.spec("length_desensitised", loss=c.spec("dpo"), alpha=0.5), "pairs"),
    "wpo": (c.spec("wpo", loss=c.spec("dpo")), "pairs"),
    "dpo_and_sft": (c.spec("combine", losses=(c.spec("dpo"), c.spec("chosen_sft")), weights=(1.0, 1.0)), "pairs"),
    "kto": (c.spec("kto"), "labels"),
    "apo_zero_unpaired": (c.spec("apo_zero_unpaired"), "labels"),
    "infonca": (c.spec("infonca", temperature=0.5), "ranked"),
    "nca_rewards": (c.spec("nca_rewards", temperature=0.5), "ranked"),
    "multi_negative_dpo": (c.spec("multi_negative_dpo"), "ranked"),
    "plackett_luce_dpo": (c.spec("plackett_luce_dpo"), "ranked"),
    "clha": (c.spec("clha"), "ranked"),
}
WITHOUT_REFERENCE = ("orpo", "cpo", "simpo", "alphapo", "chosen_sft", "clha")


def get_config(loss: str = "dpo"):
    objective, records = OBJECTIVES[loss]
    tuners = (c.spec("lora", rank=16, alpha=32.0),)
    return c.recipe(
        name=f"preference-{loss}",
        model=c.model("smollm2-135m"),
        stages=(
            c.stage(
                data=c.data(str(TASK / "train.jsonl")),
                steps=40,
                sequence_length=256,
                tuners=tuners,
                schedule=c.spec("cosine", peak=2e-3, warmup=0.05),
            ),
            c.stage(
                name="preference",
                data=c.data(str(TASK / f"{records}.jsonl"), answers=4 if records == "ranked" else 2),
                steps=40,
                batch_size=4,
                sequence_length=256,
                tuners=tuners,
                objective=objective,
                schedule=c.spec("cosine", peak=2e-4, warmup=0.1),
                cache_reference=loss not in WITHOUT_REFERENCE,
            ),
        ),
        evaluations=(
            c.spec(
                "verifier",
                label="sums",
                data=str(TASK / "test.jsonl"),
                verifier="first_integer",
                limit=200,
                max_new_tokens=8,
            ),
            c.spec("preferences", label="pairs", data=str(TASK / "pairs_test.jsonl"), limit=200),
        ),
        checkpoint=c.checkpoint(every=20),
    )
