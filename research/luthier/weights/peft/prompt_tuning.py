"""PEFT's prompt tuning: `prompt_embeddings` [length, embed]; several prompts, which it lacks, are saved as our own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from luthier.errors import LuthierError
from luthier.models.config import ModelConfig
from luthier.weights import hf, safetensors
from luthier.weights.peft import own
from luthier.weights.peft.modules import Tensor, dtype_of

NEEDED = ("num_virtual_tokens",)
# What a prompt began with does not matter any more.
KNOWN = {
    "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "prompt_tuning_init",
    "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
ALLOWED = {"task_type": (None, "CAUSAL_LM"), "num_transformer_submodules": (None, 1)}


def read(
    settings: Mapping[str, Any], entries: Mapping[str, Any], config: ModelConfig | None, path: epath.Path
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    length = settings["num_virtual_tokens"]
    if set(entries) != {"prompt_embeddings"}:
        raise LuthierError(f"expected the tensor 'prompt_embeddings', got {', '.join(sorted(entries))}", where=path)
    vectors = safetensors.read_tensor(entries["prompt_embeddings"])
    width = config.hidden_size if config else vectors.shape[-1]
    if vectors.shape != (length, width):
        raise LuthierError(
            f"prompt_embeddings are {list(vectors.shape)}, expected [{length}, {width}]",
            where=path,
            mend="Use the base model this prompt was trained on",
        )
    return "prompt_tuning", {"length": length}, {"inputs/vectors": vectors}


def write(name: str, options: Mapping[str, Any], flat: Mapping[str, Any], config: ModelConfig | None, where: object):
    if options.get("prompts", 1) > 1:
        return own.write(name, options, flat, config, where)
    (vectors,) = flat.values()
    length, width = vectors.shape
    tensors = {"prompt_embeddings": Tensor(dtype_of(vectors), (length, width), lambda: hf.to_host(vectors))}
    settings = {
        "num_attention_heads": config.num_heads if config else None,
        "num_layers": config.num_layers if config else None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "token_dim": width,
    }
    return settings, tensors
