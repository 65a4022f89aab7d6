"""Random access to raw records: `len(source)`, `source[i]`, `source.where(i)`, `source.fingerprint`.

A JSON file keeps one byte range a record and is read with `os.pread`, so any number of threads
may read at once and 10^6 records cost 24 MB. The fingerprint is of the content, not of the path.
"""

import functools
import glob
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from luthier.errors import LuthierError

_BLOCK = 1 << 20


class Source(Protocol):
    """Raw records by index."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def where(self, index: int) -> str:
        """What an error about record `index` begins with, as `file:line`."""


def open_source(path: str, *, limit: int | None = None, cache_dir: str | os.PathLike | None = None) -> Source:
    """The records of a file, of all files that match a glob (in sorted order), or of SeqIO/TFDS.

    Args:
      path: `.jsonl`, `.json` or `.parquet`, local or `gs://`, or `seqio:TASK`, `tfds:NAME:SPLIT`.
      limit: keep only the first so many records.
      cache_dir: where files of a bucket are copied to.
    """
    if path.startswith("seqio:"):
        from luthier.data import seqio_tasks

        source = seqio_tasks.open_source(path, cache_dir=cache_dir)
    elif path.startswith("tfds:"):
        from luthier.data import tfds_builders

        source = tfds_builders.open_source(path)
    else:
        files = [_open_file(file, local_copy(file, cache_dir)) for file in _matches(path)]
        source = files[0] if len(files) == 1 else Concatenated(files)
    if limit is not None:
        if limit < 1:
            raise LuthierError(f"limit is {limit}, expected at least 1", where="data.limit")
        source = Limited(source, limit)
    if not len(source):
        raise LuthierError("there are no records in it", where=path)
    return source


class JsonRecords:
    """Records of one JSON-lines file, or of one JSON list, each at a byte range of the file.

    Args:
      path: local file.
      name: what errors call it.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        self.name, self._path = name or os.fspath(path), path
        first = next((byte for block in _blocks(path) for byte in block.lstrip(b"\xef\xbb\xbf").lstrip()[:1]), None)
        self._starts, self._ends, self._lines = (_list_spans if first == ord("[") else _line_spans)(path, self.name)
        self.fingerprint = _digest(path)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = int(self._starts[index]), int(self._ends[index])
        file = os.open(self._path, os.O_RDONLY)  # not kept: a glob may match more files than can be open
        try:
            record = json.loads(os.pread(file, end - start, start).decode())
        except json.JSONDecodeError as error:
            raise LuthierError(
                f"broken JSON at column {error.colno}: {error.msg}",
                where=self.where(index),
                mend="Mend or delete that record",
            ) from None
        except UnicodeDecodeError as error:
            raise LuthierError(f"not UTF-8: {error.reason} at byte {error.start}", where=self.where(index)) from None
        finally:
            os.close(file)
        if not isinstance(record, dict):
            raise LuthierError(
                f"expected an object, got {str(record)[:40]!r}", where=self.where(index), mend='Write {"key": …}'
            )
        return record

    def where(self, index: int) -> str:
        return f"{self.name}:{self._lines[index]}"


class ParquetRecords:
    """Rows of one Parquet file; the row groups that were read last stay in memory, whatever their files.

    Args:
      path: local file.
      name: what errors call it.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        import pyarrow
        import pyarrow.parquet

        self.name, self._path = name or os.fspath(path), os.fspath(path)
        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except pyarrow.ArrowException as error:
            raise LuthierError(f"not a readable Parquet file: {str(error).splitlines()[0]}", where=self.name) from None
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._offsets = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self.fingerprint = _digest(path)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._offsets, index, side="right")) - 1
        table = _row_group(self._path, self.fingerprint, group)
        return _without_none(table.slice(index - int(self._offsets[group]), 1).to_pylist()[0])

    def where(self, index: int) -> str:
        return f"{self.name}: row {index + 1}"


@functools.lru_cache(maxsize=4)
def _row_group(path: str, fingerprint: str, group: int):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group)


class Concatenated:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self._offsets = np.concatenate([[0], np.cumsum([len(s) for s in self._sources], dtype=np.int64)])
        self.fingerprint = hashlib.blake2b(
            " ".join(s.fingerprint for s in self._sources).encode(), digest_size=16
        ).hexdigest()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, local = self._find(index)
        return source[local]

    def where(self, index: int) -> str:
        source, local = self._find(index)
        return source.where(local)

    def _find(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return self._sources[which], index - int(self._offsets[which])


class Limited:
    """The first `limit` records of a source."""

    def __init__(self, source: Source, limit: int):
        self._source, self._length = source, min(limit, len(source))
        self.where = source.where
        self.fingerprint = f"{source.fingerprint}[:{self._length}]"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]


def local_copy(path: str, cache_dir: str | os.PathLike | None = None) -> str:
    """`path` itself, or for a file of a bucket its local copy, made once for each version of it."""
    if "://" not in path:
        return path
    remote = epath.Path(path)
    status = remote.stat()
    version = f"{path} {status.length} {status.mtime}"
    folder = pathlib.Path(cache_dir or default_cache_dir()) / "files"
    copy = folder / f"{hashlib.blake2b(version.encode(), digest_size=8).hexdigest()}-{remote.name}"
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{os.getpid()}.{threading.get_ident()}")
        with remote.open("rb") as source, open(partial, "wb") as target:
            while block := source.read(_BLOCK):
                target.write(block)
        os.replace(partial, copy)
    return os.fspath(copy)


def default_cache_dir() -> pathlib.Path:
    """`$LUTHIER_CACHE`, or `~/.cache/luthier`; always local."""
    named = os.environ.get("LUTHIER_CACHE", "")
    return (
        pathlib.Path(named).expanduser()
        if named and "://" not in named
        else pathlib.Path("~/.cache/luthier").expanduser()
    )


def _matches(path: str) -> list[str]:
    folder = epath.Path(path).parent
    if glob.has_magic(path):
        if "://" in path:
            root = path[: path.index("/", path.index("://") + 3) + 1]
            files = sorted(os.fspath(file) for file in epath.Path(root).glob(path[len(root) :]))
        else:
            files = sorted(glob.glob(os.path.expanduser(path), recursive=True))
        if not files:
            raise LuthierError("no file matches", where=path)
        return files
    if not epath.Path(path).exists():
        known = sorted(f.name for f in folder.iterdir() if f.suffix in _READERS)[:8] if folder.is_dir() else []
        raise LuthierError(
            "no such file", where=path, mend=f"{folder} has {', '.join(known)}" if known else "Check data.source"
        )
    if epath.Path(path).is_dir():
        raise LuthierError("this is a directory", where=path, mend=f"Name its files, as in {path.rstrip('/')}/*.jsonl")
    return [os.path.expanduser(path)]


def _open_file(name: str, local: str) -> Source:
    reader = _READERS.get(pathlib.PurePath(name).suffix.lower())
    if reader is None:
        raise LuthierError("unknown kind of file", where=name, mend=f"Give one of {', '.join(_READERS)}")
    return reader(local, name)


_READERS = {".jsonl": JsonRecords, ".json": JsonRecords, ".ndjson": JsonRecords, ".parquet": ParquetRecords}


def _blocks(path: str | os.PathLike) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _digest(path: str | os.PathLike) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _line_spans(path: str | os.PathLike, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte ranges of the lines that are not blank, and their numbers from 1."""
    breaks, size = [], 0
    for block in _blocks(path):
        breaks.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
        size += len(block)
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    with open(path, "rb") as file:
        starts[0] = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        short = np.flatnonzero(ends - starts < 64)  # only short lines can be blank in practice; look at those
        blank = [i for i in short if not os.pread(file.fileno(), int(ends[i] - starts[i]), int(starts[i])).strip()]
    kept = np.delete(np.arange(len(starts)), blank)
    return starts[kept], ends[kept], kept + 1


def _list_spans(path: str | os.PathLike, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte ranges of the elements of a JSON list, and the lines where they begin."""
    # Latin-1 maps each byte to one character, so the decoder's positions are byte positions.
    with open(path, encoding="latin-1", newline="") as file:
        text = file.read()
    decoder, spans = json.JSONDecoder(), []
    position = _skip(text, text.index("[") + 1)
    while not text.startswith("]", position):
        try:
            end = decoder.raw_decode(text, position)[1]
        except json.JSONDecodeError as error:
            raise LuthierError(
                f"broken JSON: {error.msg}", where=f"{name}:{error.lineno}", mend="Mend or delete that record"
            ) from None
        spans.append((position, end))
        position = _skip(text, end)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            line = text.count("\n", 0, position) + 1
            raise LuthierError(
                "broken JSON: expected ',' or ']' after a record", where=f"{name}:{line}", mend="Mend that line"
            )
    starts, ends = np.asarray(spans, np.int64).reshape(-1, 2).T
    breaks = np.flatnonzero(np.frombuffer(text.encode("latin-1"), np.uint8) == ord("\n"))
    return starts, ends, np.searchsorted(breaks, starts) + 1


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _without_none(value: Any) -> Any:
    """Drops the nulls that Parquet writes for keys which another row's object has."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
