"""Tuners that PEFT lacks: each array of the collection as it is, under its path; name and options in the config."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from luthier import methods
from luthier.errors import LuthierError, near
from luthier.models.config import ModelConfig
from luthier.weights import hf, safetensors
from luthier.weights.peft.modules import Tensor, dtype_of

TYPE = "LUTHIER"

NEEDED = ("tuner", "options")
KNOWN = {"tuner", "options"}
ALLOWED = {"task_type": (None, "CAUSAL_LM")}


def read(
    settings: Mapping[str, Any], entries: Mapping[str, Any], config: ModelConfig | None, path: epath.Path
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    tuner = settings["tuner"]
    # A name from a file must not choose which module is imported.
    if methods.find(tuner, "tuner") is None:
        known = [method.name for method in methods.METHODS if method.place == "tuner"]
        raise LuthierError(f"unknown tuner {tuner!r}", where=path, mend=near(tuner, known))
    flat = {name: safetensors.read_tensor(entry) for name, entry in entries.items()}
    for name, array in flat.items():
        if config and name.startswith("layers/") and array.shape[0] != config.num_layers:
            raise LuthierError(
                f"{name!r} has {array.shape[0]} layers, the base model {config.num_layers}",
                where=path,
                mend="Use the base model this adapter was trained on",
            )
    return tuner, dict(settings["options"]), flat


def write(name: str, options: Mapping[str, Any], flat: Mapping[str, Any], config: ModelConfig | None, where: object):
    tensors = {
        path: Tensor(dtype_of(array), tuple(array.shape), lambda array=array: hf.to_host(array))
        for path, array in flat.items()
    }
    kept = {key: value for key, value in options.items() if key not in ("name", "collection")}
    return {"peft_type": TYPE, "tuner": name, "options": kept}, tensors
