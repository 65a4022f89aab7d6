"""One-token rollout (S159, arXiv 2509.26313) on the quickstart's task, and what it is to be compared with.

`--config=configs/one_token_rollout.py` samples 256 proposals a position, `:exact` takes their expectation;
`:sft`, `:dft`, `:asft` and `:masked_thought` are the rivals. Everything but the objective is equal.
"""

import pathlib

from luthier import config as c

TASK = pathlib.Path(__file__).parent / "tasks" / "chain_sum"
OBJECTIVES = {
    "mc": c.spec("one_token_rollout", k=256, temperature=1.3, beta=-0.1),
    "exact": c.spec("one_token_rollout", mode="exact", temperature=1.3, beta=-0.1),
    "sft": c.spec("sft"),
    "dft": c.spec("dft"),
    "asft": c.spec("asft", kl_weight=0.1),
    "masked_thought": c.spec("sft"),
}


def get_config(objective: str = "mc"):
    return c.recipe(
        name=f"one-token-rollout-{objective}",
        model=c.model("smollm2-135m"),
        stages=(
            c.stage(
                data=c.data(str(TASK / "train.jsonl")),
                steps=120,
                batch_size=8,
                sequence_length=256,
                tuners=(c.spec("lora", rank=16, alpha=32.0),),
                objective=OBJECTIVES[objective],
                transforms=(c.spec("masked_thought"),) if objective == "masked_thought" else (),
                schedule=c.spec("cosine", peak=2e-3, warmup=0.05),
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
        ),
        checkpoint=c.checkpoint(every=40),
    )
