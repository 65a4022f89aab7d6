"""The index of everything a recipe can name: one `Method` record each.

The table is plain data, so that `--help`, config errors and the documentation need not import
jax. `spec(name)` in `luthier.config` reads a method's options from the signature of `target`.
"""

import dataclasses
from typing import Literal

Place = Literal["data", "tuner", "objective", "optimizer", "schedule", "evaluation"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One choice in one place of a recipe.

    Attributes:
      name: what a config calls it; unique within its place.
      place: the question it answers (docs/architecture.md).
      target: `module:function`; the function's keyword-only arguments are the options.
      summary: one line for the index.
      id: the id in the ledger of owed systems, or "-".
      paper: title and identifier of the source, or "-".
      oracle: the test that holds it against something its author did not write.
      config: a config that uses it.
    """

    name: str
    place: Place
    target: str
    summary: str
    id: str = "-"
    paper: str = "-"
    oracle: str = "-"
    config: str = "-"


METHODS: tuple[Method, ...] = (
    Method(
        "sft",
        "objective",
        "luthier.objectives.sft:sft",
        "Supervised fine-tuning: negative log-likelihood of the target tokens.",
        oracle="tests/test_training_parity.py",
        config="configs/quickstart.py",
    ),
    Method(
        "dft",
        "objective",
        "luthier.objectives.dft:dft",
        "Dynamic fine-tuning: each target weighted by its own probability.",
        paper="On the Generalization of SFT (DFT)",
        oracle="tests/test_token_losses.py",
        config="configs/one_token_rollout.py",
    ),
    Method(
        "one_token_rollout",
        "objective",
        "luthier.objectives.one_token_rollout:one_token_rollout",
        "One-token rollout: proposals of the policy at each position, rewarded where they are the target.",
        id="S159",
        paper="One-Token Rollout (arXiv 2509.26313)",
        oracle="tests/test_token_losses.py",
        config="configs/one_token_rollout.py",
    ),
    Method(
        "lora",
        "tuner",
        "luthier.tuners.lora:lora",
        "Low-rank updates of linear maps, with rank-stabilised scaling as an option.",
        paper="LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732)",
        oracle="tests/test_lora.py",
        config="configs/quickstart.py",
    ),
    *(
        Method(name, "optimizer", f"luthier.optim.optimizers:{name}", summary)
        for name, summary in {
            "adamw": "Adam with decoupled weight decay.",
            "adafactor": "Factored second moments.",
            "sgd": "Stochastic gradient descent with optional momentum.",
            "lion": "Sign of an interpolated momentum.",
            "rmsprop": "Gradients over a running root mean square.",
        }.items()
    ),
    *(
        Method(name, "schedule", f"luthier.optim.schedules:{name}", summary)
        for name, summary in {
            "constant": "Linear warm-up, then constant.",
            "cosine": "Linear warm-up, then a half cosine down to `final`.",
            "linear": "Linear warm-up, then a straight line down to `final`.",
            "inverse_sqrt": "Linear warm-up, then 1/sqrt(step).",
        }.items()
    ),
    *(
        Method(
            name,
            "evaluation",
            f"luthier.evals.tasks:{name}",
            summary,
            oracle="tests/test_evals.py",
            config="configs/quickstart.py",
        )
        for name, summary in {
            "verifier": "Generated answers, scored by a verifier.",
            "choices": "Multiple choice by log-likelihood.",
            "perplexity": "exp of the mean negative log-likelihood a token.",
        }.items()
    ),
)


def find(name: str, place: str | None = None) -> Method | None:
    """The record called `name` (in `place`, where given), or None."""
    return next((m for m in METHODS if m.name == name and place in (None, m.place)), None)
