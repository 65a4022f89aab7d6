"""Makes `families/NAME/`: tiny random models of every supported family with transformers' own logits.

Run with the extra `parity`:  python tests/goldens/make_families.py

Each directory is an ordinary Hugging Face directory (`config.json`, `model.safetensors`) plus
`logits.npz`: two sequences, longer than any sliding window, and the float32 logits that transformers' eager
attention gives for each alone and for both in one batch padded on the right and on the left; and the gradient
of the weighted negative log-likelihood of both, summed: of each weight every n-th number (`grad_slice/NAME`, at most
64) and the L2 norm (`grad_norm/NAME`).
Every weight is drawn (norms and biases too) so that no term of the forward pass is trivially 0 or 1,
and is rounded to bfloat16, which halves the files without any loss: the forward pass is float32.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "families"
LENGTHS = (24, 17)
VOCAB = 128
WINDOW = 7  # shorter than both sequences
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# With head_dim 12 and theta 10000 the wavelengths are 6, 29, 135, …: one below, one between and
# the rest above these bounds (original length / 4 and original length / 1).
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LOCAL, GLOBAL = "sliding_attention", "full_attention"

FAMILIES = {
    "llama_mha": (transformers.LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_gqa_tied": (
        transformers.LlamaConfig,
        {"num_hidden_layers": 3, "tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-3},
    ),
    "llama_llama3_rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear_rope": (transformers.LlamaConfig, {"rope_parameters": {**LINEAR, "rope_theta": 5000.0}}),
    "llama_bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW, "head_dim": 16}),
    "mistral_full": (transformers.MistralConfig, {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_window": (
        transformers.Qwen2Config,
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "rms_norm_eps": 1e-4,
            "sliding_window": WINDOW,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "rms_norm_eps": 1e-4,
            "sliding_window": WINDOW,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "query_pre_attn_scalar": 9,
            "rope_parameters": {
                GLOBAL: {"rope_theta": 20000.0, **LINEAR},
                LOCAL: {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight; norms lie around the value that makes them the identity."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                value = 0.4 * noise + (0.0 if gemma else 1.0)
            elif weight.ndim == 1:
                value = 0.4 * noise
            elif "embed" in name:
                value = 0.4 * noise
            else:
                value = 1.3 * noise / weight.shape[1] ** 0.5
            weight.copy_(value.bfloat16().float())


def forward(model, tokens, mask=None) -> np.ndarray:
    """Float32 logits; positions count the tokens that are not padding."""
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions).logits.float().numpy()


def padded(sequences, side: str):
    """(tokens, mask) of the sequences in one batch, padded with token 0 on `side`."""
    width = max(map(len, sequences))
    fill = [torch.zeros(width - len(s), dtype=torch.long) for s in sequences]
    ones = [torch.ones(len(s), dtype=torch.long) for s in sequences]
    join = (lambda a, b: torch.cat([a, b])) if side == "right" else (lambda a, b: torch.cat([b, a]))
    return torch.stack(list(map(join, sequences, fill))), torch.stack(list(map(join, ones, fill)))


def gradients(model, sequences, weights) -> dict[str, np.ndarray]:
    """Autograd of sum_t weights[t] * -log p(token t+1 | tokens to t), over both sequences."""
    loss = sum(
        (weight[:-1] * torch.nn.functional.cross_entropy(model(s[None]).logits[0, :-1], s[1:], reduction="none")).sum()
        for s, weight in zip(sequences, weights)
    )
    loss.backward()
    arrays = {"nll": np.float64(loss.item())}
    for name, weight in model.named_parameters():
        flat = weight.grad.numpy().ravel()
        arrays[f"grad_slice/{name}"] = flat[:: max(1, flat.size // 64)][:64]
        arrays[f"grad_norm/{name}"] = np.linalg.norm(flat.astype(np.float64))
    return arrays


def make(name: str, seed: int) -> None:
    config_class, changes = FAMILIES[name]
    config = config_class(**{**SHAPE, **changes}, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    sequences = [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]
    alone = [forward(model, sequence[None])[0] for sequence in sequences]
    arrays = {f"tokens_{i}": s.numpy().astype(np.int32) for i, s in enumerate(sequences)}
    arrays |= {f"logits_{i}": logits for i, logits in enumerate(alone)}
    for side in ("right", "left"):
        tokens, mask = padded(sequences, side)
        logits = forward(model, tokens, mask)
        arrays |= {f"{side}_tokens": tokens.numpy().astype(np.int32), f"{side}_mask": mask.numpy().astype(bool)}
        # Only the second sequence is padded; the first is `logits_0` again.
        arrays[f"{side}_logits_1"] = logits[1][mask[1].bool().numpy()]
        gap = np.abs(arrays[f"{side}_logits_1"] - alone[1]).max()
        assert gap < 1e-4, f"{name}: transformers' own logits move by {gap} with padding on the {side}"
    weights = [torch.rand(length, generator=generator) for length in LENGTHS]
    arrays |= {f"weights_{i}": w.numpy() for i, w in enumerate(weights)} | gradients(model, sequences, weights)
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model.bfloat16().save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(directory / "logits.npz", **arrays)
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{name:20} {size / 1024:6.0f} KiB, logits std {alone[0].std():.2f}")


if __name__ == "__main__":
    for index, family in enumerate(FAMILIES):
        make(family, index)
