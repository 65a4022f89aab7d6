"""Every tuner and mask on the quickstart's task: `--config=configs/tuners.py:NAME`, LoRA without a name.

`mam` is the mix-and-match adapter (S118, arXiv 2110.04366): a prefix at attention and a scaled parallel adapter at the
MLP. Learning rates are of the order that the papers use; none was tuned here.
"""

import pathlib

from luthier import config as c

TASK = pathlib.Path(__file__).parent / "tasks" / "chain_sum"
TUNERS = {
    # name: (learning rate, tuners, mask)
    "lora": (2e-3, (c.spec("lora", rank=16, alpha=32.0),), None),
    "dora": (2e-3, (c.spec("lora", rank=16, alpha=32.0, dora=True),), None),
    "pissa": (2e-4, (c.spec("lora", rank=16, alpha=16.0, init="pissa"),), None),
    "ia3": (3e-3, (c.spec("ia3"),), None),
    "adapter": (1e-3, (c.spec("adapter"),), None),
    "parallel_adapter": (1e-3, (c.spec("adapter", placement="parallel", scale=4.0),), None),
    "prefix": (1e-2, (c.spec("prefix", length=20),), None),
    "prefix_mlp": (1e-3, (c.spec("prefix", length=20, hidden=512),), None),
    "mam": (1e-3, (c.spec("prefix", length=20), c.spec("adapter", placement="parallel", scale=4.0)), None),
    "lofit": (5e-3, (c.spec("lofit"),), None),
    "prompt": (3e-1, (c.spec("prompt_tuning", length=20),), None),
    "half": (1e-4, (), c.spec("half")),
    "norms": (1e-3, (), c.spec("norms")),
}


def get_config(tuner: str = "lora"):
    rate, tuners, mask = TUNERS[tuner]
    return c.recipe(
        name=f"tuners-{tuner}",
        model=c.model("smollm2-135m"),
        stages=(
            c.stage(
                data=c.data(str(TASK / "train.jsonl")),
                steps=60,
                batch_size=4,
                sequence_length=256,
                tuners=tuners,
                mask=mask,
                schedule=c.spec("cosine", peak=rate, warmup=0.05),
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
        checkpoint=c.checkpoint(every=20),
    )
