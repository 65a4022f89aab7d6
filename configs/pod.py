"""Fine-tuning on a slice of accelerators: fully sharded weights, bfloat16 activations, long rows.

`--config=configs/pod.py` trains every weight, `--config=configs/pod.py:lora` a LoRA of rank 16.
Point it at your model and records, and ask first whether it fits:

  luthier compile-check --config=configs/pod.py --topology=v5e:4x4 --model=llama3-8b
  luthier train --config=configs/pod.py --config.model.source=DIR --config.stages[0].data.source=FILE.jsonl --workdir=…
"""

import pathlib

from luthier import config as c

EXAMPLE = str(pathlib.Path(__file__).parent / "tasks" / "chain_sum" / "train.jsonl")


def get_config(tune: str = "full"):
    tuners, peak = ((c.spec("lora", rank=16),), 2e-4) if tune == "lora" else ((), 1e-5)
    return c.recipe(
        name=f"pod-{tune}",
        model=c.model("smollm2-135m", compute_dtype="bfloat16", remat="full"),
        mesh=c.mesh(data=1, fsdp=-1),
        stages=(
            c.stage(
                data=c.data(EXAMPLE),
                steps=1000,
                batch_size=16,
                sequence_length=4096,
                tuners=tuners,
                optimizer=c.spec("adamw", first_moment_dtype="bfloat16"),
                schedule=c.spec("cosine", peak=peak, warmup=0.03),
            ),
        ),
        checkpoint=c.checkpoint(every=100),
    )
