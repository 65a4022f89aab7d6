"""PEFT's LoRA: `lora_A.weight` [r, in], `lora_B.weight` [r, out] and DoRA's `lora_magnitude_vector` [out] of a module.

Ours are `a` [in, r], `b` [r, out] and `m` [out], stacked over layers.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from luthier.errors import LuthierError
from luthier.models.config import ModelConfig
from luthier.weights.names import SITES, leaves
from luthier.weights.peft.modules import MODULES, apart, gather, no_name, short, stacked

_ENDING = r"(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
_NAMES = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}
_WEIGHTS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}

NEEDED = ("r", "lora_alpha")
KNOWN = {
    "exclude_modules", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "qalora_group_size", "r", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
ALLOWED = {
    "bias": ("none",),
    # Other initialisations also change the base weights, so their adapter alone is not the model.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "task_type": (None, "CAUSAL_LM"),
}


def read(
    settings: Mapping[str, Any], entries: Mapping[str, Any], config: ModelConfig | None, path: epath.Path
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    # PEFT stores the base's own head beside the head's adapter.
    entries = {name: entry for name, entry in entries.items() if not name.endswith("lm_head.base_layer.weight")}
    rank, flat = settings["r"], {}
    found = gather(entries, _ENDING, "LoRA", path)
    layers = config.num_layers if config else 1 + max(max(layers) for layers in found.values())
    for (module, kind), tensors in found.items():
        for entry in tensors.values():
            if kind != "lora_magnitude_vector" and entry.shape[0 if kind == "lora_A" else -1] != rank:
                raise LuthierError(
                    f"'{module}.{kind}.weight' has shape {list(entry.shape)}, but r is {rank}", where=path
                )
        array = stacked(module, tensors, layers, path)
        flat[f"{MODULES[module]}/{_NAMES[kind]}"] = array if kind == "lora_magnitude_vector" else array.swapaxes(-1, -2)
    flat = {name: np.ascontiguousarray(array) for name, array in flat.items()}
    sites = sorted({name.rpartition("/")[0] for name in flat})
    _check(flat, sites, bool(settings.get("use_dora")), config, path)
    options = {
        "rank": rank,
        "alpha": float(settings["lora_alpha"]),
        "rslora": bool(settings.get("use_rslora", False)),
        "dora": bool(settings.get("use_dora", False)),
        "patterns": tuple(sites),
    }
    return "lora", options, flat


def _check(
    flat: Mapping[str, np.ndarray], sites: list[str], dora: bool, config: ModelConfig | None, path: epath.Path
) -> None:
    kernels = {leaf.path.removesuffix("/kernel"): leaf.shape for leaf in leaves(config)} if config else {}
    for site in sites:
        if f"{site}/a" not in flat or f"{site}/b" not in flat:
            raise LuthierError(f"{SITES[site]} has only one of lora_A and lora_B", where=path)
        if (f"{site}/m" in flat) != dora:
            has = "a" if f"{site}/m" in flat else "no"
            raise LuthierError(f"{SITES[site]} has {has} lora_magnitude_vector, but use_dora is {dora}", where=path)
        got = (flat[f"{site}/a"].shape[-2], flat[f"{site}/b"].shape[-1])
        if config and got != kernels.get(site, got):
            raise LuthierError(
                f"{SITES[site]} maps {got[0]} to {got[1]}, in the base model {kernels[site][0]} to {kernels[site][1]}",
                where=path,
                mend="Use the base model this adapter was trained on",
            )


def write(name: str, options: Mapping[str, Any], flat: Mapping[str, Any], config: ModelConfig | None, where: object):
    sites = list(dict.fromkeys(path.rpartition("/")[0] for path in flat))
    if odd := [site for site in sites if site not in SITES]:
        raise no_name(odd[0], where)
    tensors = {}
    for path, array in flat.items():
        site, _, kind = path.rpartition("/")
        tensors |= apart(SITES[site], _WEIGHTS[kind], array, np.transpose)
    alpha = float(options["alpha"])
    settings = {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == math.floor(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": int(options["rank"]),
        "target_modules": short([SITES[site] for site in sites]),
        "use_dora": bool(options.get("dora", False)),
        "use_rslora": bool(options.get("rslora", False)),
    }
    return settings, tensors
