"""PEFT's prefix tuning: `prompt_embeddings` [length, layers · 2 · kv_heads · head_dim], keys before values.

Ours is `kv` [layers, 2, length, kv_heads, head_dim]. PEFT moves an example `length` positions on and
takes keys as they are; here an example starts at 0, so keys are turned back by `length`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from luthier.errors import LuthierError
from luthier.models.attention import moved_keys
from luthier.models.config import ModelConfig
from luthier.weights import hf, safetensors
from luthier.weights.peft.modules import Tensor, dtype_of

_PATH = "layers/attention/attend/kv"

NEEDED = ("num_virtual_tokens",)
# The MLP that made a prefix is not saved with it.
KNOWN = {
    "encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "num_virtual_tokens",
    "prefix_projection", "token_dim",
}  # fmt: skip
ALLOWED = {"num_transformer_submodules": (None, 1), "task_type": (None, "CAUSAL_LM")}


def read(
    settings: Mapping[str, Any], entries: Mapping[str, Any], config: ModelConfig | None, path: epath.Path
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    config = _needed(config, path)
    if set(entries) != {"prompt_embeddings"}:
        raise LuthierError(f"expected one tensor 'prompt_embeddings', found {', '.join(sorted(entries))}", where=path)
    length = settings["num_virtual_tokens"]
    each = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    entry = entries["prompt_embeddings"]
    if entry.shape != (length, each):
        raise LuthierError(
            f"'prompt_embeddings' has shape {list(entry.shape)}, a prefix of {length} for this model {[length, each]}",
            where=path,
            mend="Use the base model this adapter was trained on",
        )
    rows = safetensors.read_tensor(entry)
    kv = rows.reshape(length, config.num_layers, 2, config.num_kv_heads, config.head_dim).transpose(1, 2, 0, 3, 4)
    return "prefix", {"length": length}, {_PATH: _moved(config, kv, -length)}


def write(name: str, options: Mapping[str, Any], flat: Mapping[str, Any], config: ModelConfig | None, where: object):
    config, kv = _needed(config, where), flat[_PATH]
    layers, _, length, heads, dim = kv.shape

    def fetch():
        return _moved(config, hf.to_host(kv), length).transpose(2, 0, 1, 3, 4).reshape(length, -1)

    settings = {
        "encoder_hidden_size": heads * dim,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": heads * dim,
    }
    return settings, {"prompt_embeddings": Tensor(dtype_of(kv), (length, layers * 2 * heads * dim), fetch)}


def _moved(config: ModelConfig, kv: np.ndarray, by: int) -> np.ndarray:
    return np.stack([np.asarray(moved_keys(config, kv[:, 0], by)), kv[:, 1]], axis=1)


def _needed(config: ModelConfig | None, where: object) -> ModelConfig:
    if config is None:
        raise LuthierError("a prefix hangs on the base model's positions: its config is needed", where=where)
    return config
