"""Makes `peft_lora/NAME/`: PEFT's LoRA on `families/llama_gqa_tied` with A and B both nonzero.

Run with the extra `parity`, after make_families.py:  python tests/goldens/make_peft_lora.py

Each directory is an adapter as PEFT saves it (`adapter_config.json`, `adapter_model.safetensors`) plus
`expected.npz`: tokens, PEFT's float32 logits, the mean cross-entropy of the next token over the positions
with label weight 1, its gradient with respect to every A and B, and the logits of PEFT's merged model.
"""

import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
BASE = HERE / "families" / "llama_gqa_tied"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}
LENGTH, BATCH, VOCAB = 16, 2, 128


def make(name: str, seed: int) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, bias="none", **ADAPTERS[name])
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    tokens = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    weights = (torch.rand((BATCH, LENGTH - 1), generator=generator) < 0.6).float()
    logits = model(tokens).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (weights * nll).sum() / weights.sum()
    loss.backward()
    directory = HERE / "peft_lora" / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    # PEFT records where the base model was; a path of this machine means nothing elsewhere.
    file = directory / "adapter_config.json"
    file.write_text(file.read_text().replace(str(BASE), "tests/goldens/families/llama_gqa_tied"))
    grads = {f"grad/{n.replace('.default', '')}": p.grad.numpy() for n, p in trained.items()}
    with torch.no_grad():
        merged = model.merge_and_unload()(tokens).logits
    np.savez_compressed(
        directory / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        weights=weights.numpy(),
        logits=logits.detach().numpy(),
        merged_logits=merged.numpy(),
        loss=np.float64(loss.item()),
        **grads,
    )
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{name}: {size / 1024:.0f} KiB, {len(trained)} tensors, loss {loss.item():.4f}")


if __name__ == "__main__":
    for index, adapter in enumerate(ADAPTERS):
        make(adapter, 40 + index)
