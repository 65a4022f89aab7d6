"""Fine-tuning on a slice of accelerators: fully sharded weights, bfloat16 activations, long rows.

`--config=configs/pod.py` trains every weight; `:METHOD` is one of `METHODS`: a LoRA of rank 16, one-token rollout,
anchored fine-tuning (which keeps the start model beside it), DPO (with the reference's log-probabilities in a file),
prompt tuning, or ProMoT's second stage.
Point it at your model and records, and ask first whether it fits:

  luthier compile-check --config=configs/pod.py --topology=v5e:4x4 --model=llama3-8b
  luthier train --config=configs/pod.py --config.model.source=DIR --config.stages[0].data.source=FILE.jsonl --workdir=…
"""

import pathlib

from luthier import config as c
from luthier.errors import LuthierError, near

EXAMPLES = pathlib.Path(__file__).parent / "tasks" / "chain_sum"
SOFT = c.spec("prompt_tuning", length=100)
METHODS = {
    # name: (highest learning rate, what differs in the stage)
    "full": (1e-5, {}),
    "lora": (2e-4, {"tuners": (c.spec("lora", rank=16),)}),
    "otr": (1e-5, {"objective": c.spec("one_token_rollout")}),
    "asft": (1e-5, {"objective": c.spec("asft")}),
    "dpo": (5e-7, {"objective": c.spec("dpo"), "cache_reference": True}),
    "prompt": (0.3, {"tuners": (SOFT,)}),
    "promot": (1e-5, {"tuners": (SOFT,), "train": ("params",)}),
}


def get_config(method: str = "full"):
    if method not in METHODS:
        raise LuthierError(f"unknown method {method!r}", where="configs/pod.py", mend=near(method, METHODS))
    peak, what = METHODS[method]
    return c.recipe(
        name=f"pod-{method}",
        model=c.model("smollm2-135m", compute_dtype="bfloat16", remat="full"),
        mesh=c.mesh(data=1, fsdp=-1),
        stages=(
            c.stage(
                data=c.data(str(EXAMPLES / ("pairs.jsonl" if method == "dpo" else "train.jsonl"))),
                steps=1000,
                batch_size=16,
                sequence_length=4096,
                optimizer=c.spec("adamw", first_moment_dtype="bfloat16"),
                schedule=c.spec("cosine", peak=peak, warmup=0.03),
                **what,
            ),
        ),
        checkpoint=c.checkpoint(every=100),
    )
