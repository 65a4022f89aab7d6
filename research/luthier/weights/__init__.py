"""Other people's weights: Hugging Face directories, GGUF files and PEFT adapters, in and out."""

import dataclasses
import json
from typing import Any

from etils import epath

from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError
from luthier.models.config import ModelConfig
from luthier.weights import gguf, hf
from luthier.weights.hf import export
from luthier.weights.peft import Adapter, read_adapter, write_adapter
from luthier.weights.source import TUNERS, Checkpoint, find, fingerprint
from luthier.weights.streaming import Place, Tensors, load_params

__all__ = [
    "TUNERS",
    "Adapter",
    "Description",
    "Pretrained",
    "describe",
    "export",
    "load",
    "load_params",
    "read_adapter",
    "write_adapter",
]


@dataclasses.dataclass(frozen=True)
class Description:
    """All of a pretrained model except its weights.

    Attributes:
      source: what it was asked for as.
      fingerprint: sha256 over the files that make the model.
      note: what must be said wherever a number of it is shown, such as "4-bit-rounded weights (Q4_1 GGUF)".
    """

    config: ModelConfig
    tokenizer: Tokenizer
    generation_config: dict[str, Any]
    source: str
    fingerprint: str
    note: str


@dataclasses.dataclass(frozen=True)
class Pretrained(Description):
    """A pretrained model.

    Attributes:
      params: the tree of docs/architecture.md.
      adapters: those that the source lays over `params`, the innermost first.
    """

    params: dict[str, Any]
    adapters: tuple[Adapter, ...] = ()


def describe(source: epath.PathLike) -> Description:
    """Config, tokenizer and provenance of a model, without reading its tensors.

    Args:
      source: `smollm2-135m`, a Hugging Face directory, a `.gguf` file, a workdir, a PEFT adapter
        directory or a hub id; paths may be `gs://`.

    Raises:
      LuthierError: if there is no such model, or it is not one we read.
    """
    return _describe(source, find(source))


def load(
    source: epath.PathLike, *, place: Place | None = None, dtype: Any = None, about: Description | None = None
) -> Pretrained:
    """A model with its weights, streamed tensor by tensor to where `place` says.

    Args:
      source: as in `describe`.
      place: (path of a parameter, shape) → its sharding, or None for the default device.
      dtype: of the weights; None keeps the stored one (float32 for GGUF).
      about: what `describe` said of this source, where it was asked already.

    Raises:
      LuthierError: as `describe`, and for a missing, unexpected, misshapen or truncated tensor.
    """
    found = find(source)
    about = about or _describe(source, found)
    adapters = tuple(read_adapter(path, about.config) for path in found.adapters)
    params = load_params(about.config, _tensors(found, about.config), place=place, dtype=dtype, where=found.path)
    fields = {field.name: getattr(about, field.name) for field in dataclasses.fields(Description)}
    return Pretrained(**fields, params=params, adapters=adapters)


def _describe(source: epath.PathLike, found: Checkpoint) -> Description:
    if found.is_gguf:
        file = gguf.read_header(found.path)
        config, tokenizer, generation = gguf.config(file), gguf.tokenizer(file), gguf.generation_config(file)
        note = gguf.note(file)
    else:
        config = hf.read_config(found.path)
        tokenizer, note = Tokenizer.from_directory(found.path), ""
        generation = hf.read_json(found.path / "generation_config.json", needed=False)
    for adapter in found.adapters:
        if (adapter / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_files(
                {"generation_config.json": json.dumps(generation).encode(), **_read_tokenizer(adapter)}, adapter
            )
    if tokenizer.vocab_size > config.vocab_size:
        raise LuthierError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size} rows",
            where=found.path,
            mend="Use the tokenizer that belongs to these weights",
        )
    return Description(config, tokenizer, generation, str(source), fingerprint(found), note)


def _read_tokenizer(directory: epath.Path) -> dict[str, bytes]:
    return Tokenizer.from_directory(directory).files


def _tensors(found: Checkpoint, config: ModelConfig) -> Tensors:
    if found.is_gguf:
        return gguf.tensors(gguf.read_header(found.path), config)
    return hf.read_tensors(found.path)
