"""Makes `trl_sft.npz`: four steps of TRL's real `SFTTrainer` on `families/llama_mha`.

Run with the extra `parity`, after make_families.py:  python tests/goldens/make_trl_sft.py

float32 on the CPU, eager attention, no dropout, packing off, sequential order; AdamW (betas 0.9, 0.999,
eps 1e-8, decay 0.1 on everything but norms and biases), learning rate 2e-3 falling linearly to 0 over
the four steps, gradient norm clipped at `CLIP`. Eight examples of unequal lengths a step, as one batch of 8 or
as 4 micro-batches of 2, with the loss on the completion or on every token; `dft` is TRL's `loss_type="dft"` on the
completion.

Losses and gradient norms are taken inside the trainer in full precision (its log rounds them).
Of each final weight the file keeps every n-th number (`slice/…`, at most 64) and the L2 norm (`norm/…`).
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
START = HERE / "families" / "llama_mha"
STEPS, BATCH, VOCAB = 4, 8, 128
LEARNING_RATE, DECAY, EPS = 2e-3, 0.1, 1e-8
CLIP = {"completion": 1.0, "all": 1e9, "dft": 1.0}  # acts on the first, not on the second


def examples(seed: int = 7) -> Dataset:
    """Token ids with a completion mask; the lengths of both parts vary."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(STEPS * BATCH):
        prompt, completion = int(rng.integers(1, 9)), int(rng.integers(1, 13))
        rows.append(
            {
                "input_ids": rng.integers(3, VOCAB, prompt + completion).tolist(),
                "completion_mask": [0] * prompt + [1] * completion,
            }
        )
    return Dataset.from_list(rows)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A stand-in: the data is tokenised, TRL only wants to know pad and EOS."""
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="t0", eos_token="t2", unk_token="t3"
    )


class Recorder(trl.SFTTrainer):
    """Keeps the loss of every micro-batch and the labels it saw."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append((inputs["input_ids"].numpy().copy(), inputs["labels"].numpy().copy()))
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append(float(loss.detach()))
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.grad_norms.append(float(norm))
        return norm


def run(target: str, micro_batches: int) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32, attn_implementation="eager")
    with tempfile.TemporaryDirectory() as directory:
        config = trl.SFTConfig(
            output_dir=directory,
            **trl_runs.ARGUMENTS,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH // micro_batches,
            gradient_accumulation_steps=micro_batches,
            packing=False,
            max_length=None,
            completion_only_loss=target != "all",
            loss_type="dft" if target == "dft" else "nll",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            weight_decay=DECAY,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=EPS,
            max_grad_norm=CLIP[target],
        )
        trainer = Recorder(model=model, args=config, train_dataset=examples(), processing_class=tokenizer())
        trainer.seen, trainer.losses, trainer.grad_norms = [], [], []
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses = np.array(trainer.losses).reshape(STEPS, micro_batches).sum(1)
    assert np.allclose(losses, logged, atol=1e-4), (losses, logged)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    width = max(ids.shape[1] for ids, _ in trainer.seen)

    def stacked(arrays, fill):
        rows = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays]
        return np.concatenate(rows).reshape(STEPS, BATCH, width).astype(np.int32)

    arrays = {
        "input_ids": stacked([ids for ids, _ in trainer.seen], 0),
        "labels": stacked([labels for _, labels in trainer.seen], -100),
        "losses": losses,
        "grad_norms": np.array(trainer.grad_norms),
        "learning_rates": np.array(rates),
    }
    return arrays | trl_runs.weights(model)


if __name__ == "__main__":
    lengths = [len(row) for row in examples()["input_ids"]]
    saved = {"lengths": np.array(lengths).reshape(STEPS, BATCH)}
    for target in CLIP:
        for micro_batches in (1, 4):
            arrays = run(target, micro_batches)
            saved |= {f"{target}_{micro_batches}/{key}": value for key, value in arrays.items()}
            print(target, micro_batches, arrays["losses"], arrays["grad_norms"], arrays["learning_rates"])
    np.savez_compressed(HERE / "trl_sft.npz", **saved)
