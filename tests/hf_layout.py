"""Hugging Face's names and layouts written out by hand: an oracle for weight import, and the way to compare goldens.

It reads safetensors with numpy alone and shares no code with `luthier.weights`.
"""

import json
import pathlib
import re

import flax.traverse_util
import ml_dtypes
import numpy as np

from luthier.models import ModelConfig

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = sorted(path.name for path in (GOLDENS / "families").iterdir())

_TOP = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.norm.weight": "final_norm/scale",
    "lm_head.weight": "head/kernel",
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def our_path(hf_name: str, gemma: bool = False) -> tuple[tuple[str, ...], int | None]:
    """(path in our parameter tree, index of the layer or None) of a Hugging Face weight."""
    if hf_name in _TOP:
        return tuple(_TOP[hf_name].split("/")), None
    layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", hf_name).groups()
    parts = rest.split(".")
    if parts[0] in _GEMMA_NORMS:
        path = ((_GEMMA_NORMS if gemma else _NORMS)[parts[0]], "scale")
    elif parts[1].endswith("_proj"):
        path = (
            {"self_attn": "attention", "mlp": "mlp"}[parts[0]],
            parts[1].removesuffix("_proj"),
            {"weight": "kernel", "bias": "bias"}[parts[2]],
        )
    else:
        path = ("attention", parts[1], "scale")
    return ("layers", *path), int(layer)


def hf_leaf(params, hf_name: str, gemma: bool = False) -> np.ndarray:
    """The array of our tree that `hf_name` names, in Hugging Face's layout."""
    path, layer = our_path(hf_name, gemma)
    for key in path:
        params = params[key]
    array = np.asarray(params if layer is None else params[layer])
    return array.T if path[-1] == "kernel" else array


def read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    dtypes = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def load(directory: pathlib.Path, dtype=np.float32) -> tuple[ModelConfig, dict]:
    """(config, params) of a Hugging Face directory."""
    hf = json.loads((directory / "config.json").read_text())
    gemma = hf["model_type"].startswith("gemma")
    flat: dict[tuple[str, ...], dict] = {}
    for name, array in read_safetensors(directory / "model.safetensors").items():
        path, layer = our_path(name, gemma)
        flat.setdefault(path, {})[layer] = (array.T if path[-1] == "kernel" else array).astype(dtype)
    stacked = {
        path: layers[None] if None in layers else np.stack([layers[i] for i in range(len(layers))])
        for path, layers in flat.items()
    }
    return ModelConfig.from_hf(hf), flax.traverse_util.unflatten_dict(stacked)
