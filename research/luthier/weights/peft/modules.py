"""PEFT's names of modules and layers, and the numbers of all layers as one array."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from luthier.errors import LuthierError
from luthier.weights import hf, safetensors
from luthier.weights.names import SITES

MODULES = {theirs: site for site, theirs in SITES.items()}
_PREFIX = r"base_model\.model\.(?:(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.)?([\w.]+?)\."

Found = Mapping[int, safetensors.Entry]


class Tensor(NamedTuple):
    """A tensor to write: `fetch` brings it to the host."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def dtype_of(array: Any) -> np.dtype:
    return np.dtype(array.dtype) if safetensors.writable(array.dtype) else np.dtype(np.float32)


def gather(
    entries: Mapping[str, safetensors.Entry], ending: str, method: str, path: epath.Path
) -> dict[tuple[str, str], Found]:
    """{(module, first group of `ending`): {layer: entry}}; a module outside the layers counts as layer 0.

    Args:
      ending: regular expression of what follows a module's name.
      method: for messages.
    """
    pattern, found = re.compile(_PREFIX + ending), {}
    for name, entry in entries.items():
        match = pattern.fullmatch(name)
        if not match or match[2] not in MODULES or ("layers/" in MODULES[match[2]]) != (match[1] is not None):
            raise LuthierError(
                f"tensor {name!r} adapts a module we have no {method} for",
                where=path,
                mend=f"Supported: {', '.join(MODULES)}",
            )
        layer, module, kind = match.groups()
        found.setdefault((module, kind), {})[int(layer or 0)] = entry
    return found


def stacked(module: str, found: Found, layers: int | None, path: epath.Path) -> np.ndarray:
    """Their tensors of a module, over all layers first.

    Args:
      layers: of the base model; None takes those that are there.
    """
    if not MODULES[module].startswith("layers/"):
        return safetensors.read_tensor(found[0])
    layers = layers or 1 + max(found)
    if sorted(found) != list(range(layers)):
        absent = sorted(set(range(layers)) ^ set(found))[0]
        raise LuthierError(
            f"{module} is adapted in {len(found)} layers of {layers} (not in layer {absent})"
            if absent < layers
            else f"{module} has a layer {absent}, the base model has {layers}",
            where=path,
            mend="Adapters must cover all layers",
        )
    return np.stack([safetensors.read_tensor(found[layer]) for layer in range(layers)])


def apart(module: str, ending: str, array: Any, view: Callable[[np.ndarray], np.ndarray]) -> dict[str, Tensor]:
    """Our array of a site as their tensors: `…layers.N.MODULE.ENDING`, each one layer as `view` shows it."""
    in_layers = MODULES[module].startswith("layers/")
    tensors = {}
    for layer in range(array.shape[0]) if in_layers else (None,):
        prefix = "base_model.model." + ("" if layer is None else f"model.layers.{layer}.")
        shape = view(np.broadcast_to(np.float32(0), array.shape[in_layers:])).shape

        def fetch(layer=layer):
            return view(hf.to_host(array if layer is None else hf.layer_of(array, layer)))

        tensors[f"{prefix}{module}.{ending}"] = Tensor(dtype_of(array), shape, fetch)
    return tensors


def no_name(site: str, where: object) -> LuthierError:
    return LuthierError(f"site {site!r} has no PEFT name", where=where, mend="Merge the adapter and export it whole")


def short(modules: list[str]) -> list[str]:
    """`target_modules`."""
    return sorted({module.rpartition(".")[2] for module in modules})
