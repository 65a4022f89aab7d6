"""PEFT's (IA)³: `ia3_l` of a module, [out, 1] on what it gives and [1, in] on what a feed-forward module takes.

Ours is `scale` [out] at the module, or at the hook before it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from luthier.errors import LuthierError
from luthier.models.config import ModelConfig
from luthier.weights.names import SITES, leaves
from luthier.weights.peft.modules import MODULES, apart, gather, no_name, short, stacked

# Modules whose input is the value of a hook.
_HOOKS = {"mlp.down_proj": "layers/mlp/inner", "self_attn.o_proj": "layers/attention/heads"}
_BEHIND = {hook: module for module, hook in _HOOKS.items()}

NEEDED = ()
KNOWN = {"exclude_modules", "feedforward_modules", "init_ia3_weights", "target_modules"}
ALLOWED = {"task_type": (None, "CAUSAL_LM")}


def read(
    settings: Mapping[str, Any], entries: Mapping[str, Any], config: ModelConfig | None, path: epath.Path
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    kernels = {leaf.path.removesuffix("/kernel"): leaf.shape for leaf in leaves(config)} if config else {}
    flat, found = {}, gather(entries, r"(ia3_l)(?:\.default)?", "(IA)³", path)
    layers = config.num_layers if config else 1 + max(max(layers) for layers in found.values())
    for (module, _), tensors in found.items():
        array = stacked(module, tensors, layers, path)
        of_input = array.shape[-2] == 1
        if of_input and module not in _HOOKS:
            raise LuthierError(
                f"the input of {module} is scaled; we have a hook only before {', '.join(_HOOKS)}", where=path
            )
        numbers = array.reshape(*array.shape[:-2], -1)
        size = kernels.get(MODULES[module], (numbers.shape[-1],) * 2)[0 if of_input else 1]
        if numbers.shape[-1] != size:
            raise LuthierError(
                f"{module} is scaled by {numbers.shape[-1]} numbers, the base model has {size}",
                where=path,
                mend="Use the base model this adapter was trained on",
            )
        if of_input and module == "self_attn.o_proj":
            if config is None:
                raise LuthierError("scaled heads cannot be read without the base model's config", where=path)
            numbers = numbers.reshape(layers, config.num_heads, config.head_dim)
        flat[f"{_HOOKS[module] if of_input else MODULES[module]}/scale"] = numbers
    return "ia3", {"patterns": tuple(sorted(name.rpartition("/")[0] for name in flat))}, flat


def write(name: str, options: Mapping[str, Any], flat: Mapping[str, Any], config: ModelConfig | None, where: object):
    tensors, outputs, inputs = {}, [], []
    for path, array in flat.items():
        site = path.rpartition("/")[0]
        if site in _BEHIND:
            inputs.append(_BEHIND[site])
            tensors |= apart(_BEHIND[site], "ia3_l", array, lambda x: x.reshape(1, -1))
        elif site in SITES:
            outputs.append(SITES[site])
            tensors |= apart(SITES[site], "ia3_l", array, lambda x: x.reshape(-1, 1))
        else:
            raise no_name(site, where)
    if both := sorted(set(inputs) & set(outputs)):
        raise LuthierError(f"PEFT scales what {both[0]} takes or what it gives, not both", where=where)
    settings = {
        "fan_in_fan_out": False,
        "feedforward_modules": short(inputs),
        "init_ia3_weights": True,
        "peft_type": "IA3",
        "target_modules": short(inputs + outputs),
    }
    return settings, tensors
