"""ProMoT (S146, arXiv 2211.00635) on the quickstart's task: first a soft prompt with the model frozen, then the model
with that prompt frozen and attached; the prompt stays with its task and is left out elsewhere.

`--config=configs/promot.py` is ProMoT. What it is compared with: `:full` and `:prompt` (its second and its first stage
alone), and the paper's variants `:one_shot` (a demonstration before each example of the second stage), `:joint` (both
at once), `:random` (a prompt that was never trained) and `:lora` (LoRA in place of the prompt). Optimizer, rates, label
smoothing and dropout are published ones (0.3 for the prompt is PaLM's, 1e-3 for the model all models'); steps and
prompt are smaller.
"""

import pathlib

from luthier import config as c

TASK = pathlib.Path(__file__).parent / "tasks" / "chain_sum"
SOFT = c.spec("prompt_tuning", length=20)
LORA = c.spec("lora", rank=4, alpha=8.0)
RELATIVE = {"multiply_by_parameter_scale": True}  # T5X's Adafactor; the prompt's has it off


def first_stage(tuner):
    rate = 0.3 if tuner is SOFT else 1e-3
    return _stage(
        "format", 100, rate, c.spec("sft", z_loss=1e-4), c.spec("adafactor", weight_decay=1e-5), tuners=(tuner,)
    )


def second_stage(tuners, train=("params",), shots=0):
    objective = c.spec("sft", label_smoothing=0.1)
    return _stage(
        "model", 60, 1e-3, objective, c.spec("adafactor", **RELATIVE), tuners=tuners, train=train, shots=shots
    )


def _stage(name, steps, rate, objective, optimizer, shots=0, **what):
    return c.stage(
        name=name,
        data=c.data(str(TASK / "train.jsonl"), shots=shots),
        steps=steps,
        batch_size=8,
        sequence_length=128,
        objective=objective,
        optimizer=optimizer,
        schedule=c.spec("constant", peak=rate, warmup=0.0),
        clip_norm=0.0,
        **what,
    )


STAGES = {
    "promot": (first_stage(SOFT), second_stage((SOFT,))),
    "one_shot": (first_stage(SOFT), second_stage((SOFT,), shots=1)),
    "full": (second_stage(()),),
    "prompt": (first_stage(SOFT),),
    "joint": (second_stage((SOFT,), train=("params", "prompt")),),
    "random": (second_stage((c.spec("prompt_tuning", length=20, init="uniform"),)),),
    "lora": (first_stage(LORA), second_stage((LORA,))),
}


def get_config(method: str = "promot"):
    sums = {
        "data": str(TASK / "test.jsonl"),
        "verifier": "first_integer",
        "limit": 200,
        "max_new_tokens": 8,
    }
    return c.recipe(
        name=f"promot-{method}",
        model=c.model("smollm2-135m", dropout=0.1),
        stages=STAGES[method],
        evaluations=(
            c.spec("verifier", label="sums", **sums),
            c.spec("verifier", label="sums-without", without=("prompt", "lora"), **sums),
        ),
        checkpoint=c.checkpoint(every=50),
    )
