"""Makes `trl_reward.npz`: four steps of TRL's real `RewardTrainer` on `reward/`.

Run with the extra `parity`, after make_reward.py:  python tests/goldens/make_trl_reward.py

float32 on the CPU, eager attention, no dropout, sequential order; AdamW (betas 0.9, 0.999, eps 1e-8, no decay),
constant learning rate, no clipping, four pairs of unequal lengths a step with margins, and centring by 0.01.

`input_ids` are `[step, 2 · pairs, T]`, the preferred answers first, padded with token 2, which none holds. Of each
final weight the file keeps every n-th number (`slice/…`, at most 64) and the L2 norm (`norm/…`).
"""

import pathlib
import tempfile

import numpy as np
import tokenizers
import torch
import transformers
import trl
import trl_runs
from datasets import Dataset

HERE = pathlib.Path(__file__).parent
STEPS, BATCH, VOCAB, PAD, LONGEST = 4, 4, 64, 2, 14


def examples(seed: int = 5) -> Dataset:
    rng = np.random.default_rng(seed)
    answer = lambda: rng.integers(3, VOCAB, int(rng.integers(3, LONGEST + 1))).tolist()  # noqa: E731
    return Dataset.from_list(
        [
            {"chosen_ids": answer(), "rejected_ids": answer(), "margin": float(rng.uniform(0, 2))}
            for _ in range(STEPS * BATCH)
        ]
    )


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"t{PAD}", eos_token=f"t{PAD}", unk_token="t3"
    )


class Recorder(trl.RewardTrainer):
    """Keeps the loss of every step and what it saw."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"].numpy()
        self.seen.append(np.pad(ids, ((0, 0), (0, LONGEST - ids.shape[1])), constant_values=PAD))
        self.margins.append(inputs["margin"].numpy().copy())
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append(float(loss.detach()))
        return loss


if __name__ == "__main__":
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        HERE / "reward", dtype=torch.float32, attn_implementation="eager"
    )
    with tempfile.TemporaryDirectory() as directory:
        config = trl.RewardConfig(
            output_dir=directory,
            **trl_runs.ARGUMENTS,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            center_rewards_coefficient=0.01,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1e9,
        )
        trainer = Recorder(model=model, args=config, train_dataset=examples(), processing_class=tokenizer())
        trainer.seen, trainer.margins, trainer.losses = [], [], []
        trainer.train()
    saved = {
        "input_ids": np.stack(trainer.seen).astype(np.int32),
        "margins": np.stack(trainer.margins),
        "losses": np.array(trainer.losses),
    }
    logged = [entry for entry in trainer.state.log_history if "mean_reward" in entry]
    saved |= {f"logged/{key}": np.array([e[key] for e in logged]) for key in ("mean_reward", "margin", "accuracy")}
    saved |= trl_runs.weights(model)
    print(saved["losses"], saved["logged/margin"], saved["logged/accuracy"])
    np.savez_compressed(HERE / "trl_reward.npz", **saved)
