"""Writing a directory so that it is whole or not there at all."""

import contextlib
import errno
import fnmatch
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from luthier.errors import LuthierError

# What an export may have left in a directory: a newer one must not be read together with it.
_OWNED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_PARTIAL = ".partial"


class Files:
    """The files of a directory while they are written under temporary names."""

    def __init__(self, directory: epath.Path):
        self.directory = directory
        self.names: list[str] = []

    def path(self, name: str) -> epath.Path | None:
        """Where to write a file; None on processes that do not write."""
        if jax.process_index():
            return None
        self.names.append(name)
        return self.directory / (name + _PARTIAL)

    def write(self, name: str, content: bytes) -> None:
        if (path := self.path(name)) is not None:
            path.write_bytes(content)

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def replacing(directory: epath.PathLike, last: str) -> Iterator[Files]:
    """Collects files and puts them in place together; on an error the directory stays as it was.

    Every process leaves when the directory is whole.

    Args:
      last: the file without which the directory is not read; it goes first and comes last.

    Raises:
      LuthierError: if the disk is full or the directory cannot be written.
    """
    files = Files(epath.Path(directory))
    try:
        if not jax.process_index():
            files.directory.mkdir(parents=True, exist_ok=True)
        yield files
        if not jax.process_index():
            _settle(files, last)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("luthier: a directory is written")
    except OSError as error:
        _discard(files)
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise LuthierError(
            f"cannot write: {reason}", where=files.directory, mend="Free space or write elsewhere"
        ) from error
    except BaseException:
        _discard(files)
        raise


def _settle(files: Files, last: str) -> None:
    (files.directory / last).unlink(missing_ok=True)
    for old in _owned(files.directory.iterdir()):
        if old.name not in files.names:
            old.unlink()
    for name in sorted(files.names, key=lambda name: name == last):
        (files.directory / (name + _PARTIAL)).replace(files.directory / name)


def _owned(found: Iterable[epath.Path]) -> list[epath.Path]:
    return [path for path in found if any(fnmatch.fnmatch(path.name, pattern) for pattern in _OWNED)]


def _discard(files: Files) -> None:
    with contextlib.suppress(OSError):
        for name in files.names:
            (files.directory / (name + _PARTIAL)).unlink(missing_ok=True)
