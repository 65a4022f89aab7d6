"""Makes `trl_dpo.npz` and `trl_dpo_lora/`: four steps of TRL's real `DPOTrainer` on `families/llama_mha`.

Run with the extra `parity`, after make_families.py:  python tests/goldens/make_trl_dpo.py

float32 on the CPU, eager attention, no dropout, sequential order; AdamW (betas 0.9, 0.999, eps 1e-8, no decay),
constant learning rate, no clipping, β 0.5, eight pairs of unequal lengths a step. `dpo` trains all weights, `lora` an
adapter of rank 4 on queries and values (as it began and ended: `trl_dpo_lora/{start,end}`), and `mixed` all weights
by `loss_type=["ipo", "sft"]` with weights (1, 0.5) and `ld_alpha` 0.3. `sync` is `dpo` with a reference that takes over
0.6 of the policy every second step.

Of each final weight the file keeps every n-th number (`slice/…`, at most 64) and the L2 norm (`norm/…`).
"""

import pathlib
import shutil
import tempfile

import numpy as np
import peft
import tokenizers
import torch
import transformers
import trl
import trl_runs
from datasets import Dataset

HERE = pathlib.Path(__file__).parent
START, ADAPTER = HERE / "families" / "llama_mha", HERE / "trl_dpo_lora"
STEPS, BATCH, VOCAB = 4, 8, 128
CASES = {
    "dpo": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-2},
    "sync": {
        "learning_rate": 1e-3,
        "sync_ref_model": True,
        "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 2,
    },
    "mixed": {"learning_rate": 1e-3, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.3},
}


def examples(seed: int = 11) -> Dataset:
    rng = np.random.default_rng(seed)
    text = lambda low, high: " ".join(f"t{i}" for i in rng.integers(3, VOCAB, int(rng.integers(low, high))))  # noqa: E731
    rows = [(text(1, 8), text(1, 12), text(1, 12)) for _ in range(STEPS * BATCH)]
    return Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in rows])


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", unk_token="t3")


class Recorder(trl.DPOTrainer):
    """Keeps the loss of every step and what it saw."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append((inputs["input_ids"].numpy().copy(), inputs["completion_mask"].numpy().copy()))
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append(float(loss.detach()))
        return loss


def run(name: str) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as directory:
        config = trl.DPOConfig(
            output_dir=directory,
            **trl_runs.ARGUMENTS,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            max_length=None,
            beta=0.5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1e9,
            **CASES[name],
        )
        trainer = Recorder(
            model=model,
            args=config,
            train_dataset=examples(),
            processing_class=tokenizer(),
            peft_config=adapter if name == "lora" else None,
        )
        trainer.seen, trainer.losses = [], []
        if name == "lora":
            shutil.rmtree(ADAPTER, ignore_errors=True)
            trainer.model.save_pretrained(ADAPTER / "start")
        trainer.train()
        if name == "lora":
            trainer.model.save_pretrained(ADAPTER / "end")
            for readme in ADAPTER.glob("*/README.md"):
                readme.unlink()
    width = max(ids.shape[1] for ids, _ in trainer.seen)
    stacked = lambda index: np.stack(  # noqa: E731
        [np.pad(s[index], ((0, 0), (0, width - s[index].shape[1]))) for s in trainer.seen]
    ).astype(np.int32)
    logged = {key: [e[key] for e in trainer.state.log_history if key in e] for key in trainer.state.log_history[0]}
    arrays = {"input_ids": stacked(0), "is_completion": stacked(1), "losses": np.array(trainer.losses)}
    arrays |= {key: np.array(value) for key, value in logged.items() if key.startswith(("rewards/", "logps/"))}
    return arrays if name == "lora" else arrays | trl_runs.weights(model)


if __name__ == "__main__":
    saved = {}
    for name in CASES:
        arrays = run(name)
        saved |= {f"{name}/{key}": value for key, value in arrays.items()}
        print(name, arrays["losses"], arrays["rewards/margins"])
    np.savez_compressed(HERE / "trl_dpo.npz", **saved)
