"""PEFT adapter directories, in and out.

PEFT keeps `lora_A.weight` [r, in] and `lora_B.weight` [out, r] for each module; ours are `a` [in, r]
and `b` [r, out], stacked over layers.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError
from luthier.models.config import ModelConfig
from luthier.weights import hf, safetensors
from luthier.weights.files import replacing
from luthier.weights.names import SITES, leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {theirs: site for site, theirs in SITES.items()}
_KEY = re.compile(
    r"base_model\.model\.(?:(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.)?"
    r"([\w.]+?)\.lora_(A|B)(?:\.default)?\.weight"
)
# Keys that say nothing of the forward pass, or that we honour; any other key must hold "off".
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "exclude_modules", "task_type", "use_rslora",
}  # fmt: skip
# These initialisations also change the base weights, so their adapter alone is not the model.
_PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")


class Adapter(NamedTuple):
    """A LoRA adapter.

    Attributes:
      options: `rank`, `alpha`, `rslora` and `patterns`, as `spec('lora', **options)` takes them.
      variables: the tree of the tuner's collection: `layers/attention/q/{a, b}` and so on.
    """

    options: dict[str, Any]
    variables: dict[str, Any]


def base_of(directory: epath.PathLike) -> str:
    """The source of the model that an adapter belongs to; a path relative to the adapter is made whole.

    Raises:
      LuthierError: if the adapter does not say.
    """
    directory = epath.Path(directory)
    base = hf.read_json(directory / CONFIG).get("base_model_name_or_path")
    if not base:
        raise LuthierError(
            "base_model_name_or_path is empty",
            where=directory / CONFIG,
            mend="Write the source of its base model there",
        )
    beside = directory / base
    return str(beside) if base.startswith(".") and beside.exists() else base


def read_adapter(directory: epath.PathLike, config: ModelConfig | None = None) -> Adapter:
    """Reads an adapter.

    Args:
      config: of the base model, to check the sizes against.

    Raises:
      LuthierError: for an adapter that uses more than plain LoRA, does not cover every layer, or
        does not fit `config`.
    """
    directory = epath.Path(directory)
    settings = _read_settings(directory / CONFIG)
    rank = settings["r"]
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for name, entry in safetensors.read_header(weight_file(directory)).items():
        if name.endswith("lm_head.base_layer.weight"):  # PEFT stores the base's own head beside the head's adapter
            continue
        path, layer = _our_path(name, directory)
        if entry.shape[0 if path.endswith("/a") else -1] != rank:
            raise LuthierError(f"{name!r} has shape {list(entry.shape)}, but r is {rank}", where=directory / WEIGHTS)
        pieces.setdefault(path, {})[layer] = safetensors.read_tensor(entry).T
    if not pieces:
        raise LuthierError("the adapter is empty", where=directory / WEIGHTS)
    layers = config.num_layers if config else 1 + max(max(found) for found in pieces.values())
    flat = {path: _stack(path, found, layers, directory) for path, found in pieces.items()}
    sites = sorted({path.rpartition("/")[0] for path in flat})
    _check(flat, sites, config, directory)
    options = {
        "rank": rank,
        "alpha": float(settings["lora_alpha"]),
        "rslora": bool(settings.get("use_rslora", False)),
        "patterns": tuple(sites),
    }
    return Adapter(options, unflatten_dict(flat, sep="/"))


def _read_settings(path: epath.Path) -> dict[str, Any]:
    settings = hf.read_json(path)
    reject = lambda what: LuthierError(f"{what} is not supported", where=path, mend="Merge it into its base with PEFT")  # noqa: E731
    if settings.get("peft_type") != "LORA":
        raise reject(f"peft_type {settings.get('peft_type')!r}")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise reject(f"task_type {settings['task_type']!r}")
    if settings.get("bias", "none") != "none":
        raise reject(f"bias {settings['bias']!r}")
    if settings.get("init_lora_weights") not in _PLAIN_INIT:
        raise reject(f"init_lora_weights {settings['init_lora_weights']!r}")
    for key in ("rank_pattern", "alpha_pattern", *sorted(settings.keys() - _KNOWN)):
        if settings.get(key):
            raise reject(f"{key} {settings[key]!r}")
    for key in ("r", "lora_alpha"):
        if key not in settings:
            raise LuthierError(f"key {key!r} is missing", where=path)
    return settings


def weight_file(directory: epath.Path) -> epath.Path:
    """The tensors of an adapter.

    Raises:
      LuthierError: if they are absent or pickled.
    """
    if not (directory / WEIGHTS).exists():
        raise LuthierError(f"no {WEIGHTS}", where=directory, mend="Only safetensors are read; save the adapter again")
    return directory / WEIGHTS


def _our_path(name: str, directory: epath.Path) -> tuple[str, int]:
    """(path in the collection, layer); a site outside the layers counts as layer 0."""
    found = _KEY.fullmatch(name)
    if not found or found[2] not in _MODULES or ("layers/" in _MODULES[found[2]]) != (found[1] is not None):
        raise LuthierError(
            f"tensor {name!r} adapts a module we have no LoRA for",
            where=directory / WEIGHTS,
            mend=f"Supported: {', '.join(_MODULES)}",
        )
    layer, module, which = found.groups()
    return f"{_MODULES[module]}/{which.lower()}", int(layer or 0)


def _stack(path: str, found: Mapping[int, np.ndarray], layers: int, directory: epath.Path) -> np.ndarray:
    if not path.startswith("layers/"):
        return np.ascontiguousarray(found[0])
    if sorted(found) != list(range(layers)):
        absent = sorted(set(range(layers)) ^ set(found))[0]
        raise LuthierError(
            f"{path} is adapted in {len(found)} layers of {layers} (not in layer {absent})"
            if absent < layers
            else f"{path} has a layer {absent}, the base model has {layers}",
            where=directory / WEIGHTS,
            mend="Adapters must cover all layers",
        )
    return np.stack([found[layer] for layer in range(layers)])


def _check(flat: Mapping[str, np.ndarray], sites: list[str], config: ModelConfig | None, directory: epath.Path) -> None:
    kernels = {leaf.path.removesuffix("/kernel"): leaf.shape for leaf in leaves(config)} if config else {}
    for site in sites:
        if f"{site}/a" not in flat or f"{site}/b" not in flat:
            raise LuthierError(f"{SITES[site]} has only one of lora_A and lora_B", where=directory / WEIGHTS)
        got = (flat[f"{site}/a"].shape[-2], flat[f"{site}/b"].shape[-1])
        if config and got != kernels.get(site, got):
            raise LuthierError(
                f"{SITES[site]} maps {got[0]} to {got[1]}, in the base model {kernels[site][0]} to {kernels[site][1]}",
                where=directory / WEIGHTS,
                mend="Use the base model this adapter was trained on",
            )


def write_adapter(
    directory: epath.PathLike,
    options: Mapping[str, Any],
    variables: Mapping[str, Any],
    *,
    base: str,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes an adapter that PEFT loads; `adapter_config.json` comes last.

    Every process calls it; process 0 writes.

    Args:
      options: `rank`, `alpha` and `rslora` of the tuner (others are not PEFT's business).
      variables: the tuner's collection; every site in it is written.
      base: the source of the base model.

    Raises:
      LuthierError: for a site that PEFT has no name for, or if the directory cannot be written.
    """
    flat = flatten_dict(variables, sep="/")
    sites = list(dict.fromkeys(path.rpartition("/")[0] for path in flat))
    if odd := [site for site in sites if site not in SITES]:
        raise LuthierError(
            f"site {odd[0]!r} has no PEFT name", where=directory, mend="Merge the adapter and export it whole"
        )
    plan = {}
    for path, array in flat.items():
        site, _, which = path.rpartition("/")
        for layer in range(array.shape[0]) if site.startswith("layers/") else (None,):
            prefix = "base_model.model." + ("" if layer is None else f"model.layers.{layer}.")
            plan[f"{prefix}{SITES[site]}.lora_{which.upper()}.weight"] = (array, layer)
    rows = [(name, _dtype(array), array.shape[-2:][::-1]) for name, (array, _) in plan.items()]

    def fetch(name: str) -> np.ndarray:
        array, layer = plan[name]
        return hf.to_host(array if layer is None else hf.layer_of(array, layer)).T

    with replacing(directory, last=CONFIG) as files:
        safetensors.write(files.path(WEIGHTS), rows, fetch)
        for name, content in (tokenizer.files if tokenizer else {}).items():
            files.write(name, content)
        files.write_json(CONFIG, _settings(options, sites, base))


def _dtype(array: Any) -> np.dtype:
    return np.dtype(array.dtype) if safetensors.writable(array.dtype) else np.dtype(np.float32)


def _settings(options: Mapping[str, Any], sites: list[str], base: str) -> dict[str, Any]:
    alpha = float(options["alpha"])
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == math.floor(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": int(options["rank"]),
        "target_modules": sorted(SITES[site].rpartition(".")[2] for site in sites),
        "task_type": "CAUSAL_LM",
        "use_rslora": bool(options.get("rslora", False)),
    }
