"""Adapter directories: PEFT's own, in and out, and the same two files for tuners that PEFT lacks.

A directory holds `adapter_config.json`, which names the base model and says what was tuned how, and
`adapter_model.safetensors`. Each format has a module: `read` makes options and variables of a tuner
of them, `write` the reverse.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError
from luthier.models.config import ModelConfig
from luthier.weights import hf, safetensors
from luthier.weights.files import replacing
from luthier.weights.peft import ia3, lora, own, prefix, prompt_tuning

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's name of a method → the module of its format, and the tuner that it is here.
_FORMATS = {"LORA": lora, "IA3": ia3, "PREFIX_TUNING": prefix, "PROMPT_TUNING": prompt_tuning, own.TYPE: own}
_OF_TUNER = {"lora": lora, "ia3": ia3, "prefix": prefix, "prompt_tuning": prompt_tuning}


class Adapter(NamedTuple):
    """A trained tuner: `spec(name, **options)` makes it.

    Attributes:
      name: of a tuner in `luthier.methods`.
      options: without `collection`, which is the reader's choice.
      variables: the tree of its collection: `layers/attention/q/{a, b}` and so on.
    """

    name: str
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


def weight_file(directory: epath.Path) -> epath.Path:
    """The tensors of an adapter.

    Raises:
      LuthierError: if they are absent or pickled.
    """
    if not (directory / WEIGHTS).exists():
        raise LuthierError(f"no {WEIGHTS}", where=directory, mend="Only safetensors are read; save the adapter again")
    return directory / WEIGHTS


def read_adapter(directory: epath.PathLike, config: ModelConfig | None = None) -> Adapter:
    """Reads an adapter.

    Args:
      config: of the base model, to check the sizes against; prefixes cannot be read without it.

    Raises:
      LuthierError: for an adapter that uses more of PEFT than its tuner has here, does not cover
        every layer, or does not fit `config`.
    """
    directory = epath.Path(directory)
    settings = hf.read_json(directory / CONFIG)
    method = settings.get("peft_type")
    if method not in _FORMATS:
        raise LuthierError(
            f"peft_type {method!r} is not supported",
            where=directory / CONFIG,
            mend=f"Merge it into its base with PEFT; read are {', '.join(_FORMATS)}",
        )
    _check_settings(settings, _FORMATS[method], directory / CONFIG)
    entries = safetensors.read_header(weight_file(directory))
    if not entries:
        raise LuthierError("the adapter is empty", where=directory / WEIGHTS)
    name, options, flat = _FORMATS[method].read(settings, entries, config, directory / WEIGHTS)
    return Adapter(name, options, unflatten_dict(flat, sep="/"))


def _check_settings(settings: Mapping[str, Any], form, path: epath.Path) -> None:
    """Keys that a format does not know must hold "off"."""
    wrong = [key for key, allowed in form.ALLOWED.items() if key in settings and settings[key] not in allowed]
    wrong += [key for key in sorted(settings.keys() - form.KNOWN - form.ALLOWED.keys() - _SILENT) if settings[key]]
    if wrong:
        mend = "Merge it into its base with PEFT"
        raise LuthierError(f"{wrong[0]} {settings[wrong[0]]!r} is not supported", where=path, mend=mend)
    for key in form.NEEDED:
        if key not in settings:
            raise LuthierError(f"key {key!r} is missing", where=path)


# Keys that say nothing of the forward pass.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config",
}  # fmt: skip


def write_adapter(
    directory: epath.PathLike,
    adapter: Adapter,
    *,
    base: str,
    config: ModelConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes an adapter, for PEFT to load where PEFT has its method; `adapter_config.json` comes last.

    Every process calls it; process 0 writes.

    Args:
      base: the source of the base model.
      config: of the base model; prefixes cannot be written without it.

    Raises:
      LuthierError: for a site that PEFT has no name for, or if the directory cannot be written.
    """
    flat = flatten_dict(adapter.variables, sep="/")
    form = _OF_TUNER.get(adapter.name, own)
    settings, tensors = form.write(adapter.name, adapter.options, flat, config, directory)
    rows = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with replacing(directory, last=CONFIG) as files:
        safetensors.write(files.path(WEIGHTS), rows, lambda name: tensors[name].fetch())
        for name, content in (tokenizer.files if tokenizer else {}).items():
            files.write(name, content)
        common = {"base_model_name_or_path": base, "inference_mode": True, "task_type": "CAUSAL_LM"}
        files.write_json(CONFIG, dict(sorted({**common, **settings}.items())))
