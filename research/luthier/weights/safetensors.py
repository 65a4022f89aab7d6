"""The safetensors format, one tensor at a time.

The format is 8 bytes of little-endian length, a JSON header of `name: {dtype, shape, data_offsets}`,
then the data. The `safetensors` library needs a local file to read and a whole shard in memory to
write; this reads and writes any `epath`, holding one tensor.
Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from luthier.errors import LuthierError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's own limit


class Entry(NamedTuple):
    """Where one tensor lies: `offset` in bytes from the start of the file."""

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def read_header(path: epath.Path) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Raises:
      LuthierError: if the file is truncated or is not safetensors, or a dtype is not a float we read.
    """
    length = path.stat().length
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > min(length - 8, _MAX_HEADER):
            raise _truncated(path, length, 8 + size if 8 <= length and size <= _MAX_HEADER else None)
        try:
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            entries = {name: _entry(path, name, fields, 8 + size) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LuthierError(
                "the header is not safetensors", where=path, mend="Download or export it again"
            ) from None
    end = max((e.offset + e.dtype.itemsize * math.prod(e.shape) for e in entries.values()), default=8 + size)
    if end > length:
        raise _truncated(path, length, end)
    return entries


def _entry(path: epath.Path, name: str, fields: Mapping[str, Any], start: int) -> Entry:
    if fields["dtype"] not in DTYPES:
        raise LuthierError(
            f"tensor {name!r} is stored as {fields['dtype']}", where=path, mend=f"Supported: {', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[fields["dtype"]], tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(name)
    return Entry(path, dtype, shape, start + begin)


def _truncated(path: epath.Path, length: int, wanted: int | None) -> LuthierError:
    expected = f"{wanted:,}" if wanted else "more"
    return LuthierError(
        f"the file is truncated or not safetensors: it has {length:,} bytes, its header asks for {expected}",
        where=path,
        mend="Download or export it again",
    )


def read_tensor(entry: Entry) -> np.ndarray:
    """One tensor, read into memory of its own."""
    count = math.prod(entry.shape)
    buffer = bytearray(count * entry.dtype.itemsize)
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            got = file.readinto(view[done:])
            if not got:
                raise _truncated(entry.file, entry.offset + done, entry.offset + len(buffer))
            done += got
    return np.frombuffer(buffer, entry.dtype, count).reshape(entry.shape)


def write(
    path: epath.Path | None,
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
    fetch: Callable[[str], np.ndarray],
) -> None:
    """Writes tensors in the given order, fetching each just before it is written.

    Args:
      path: None fetches and writes nothing: on processes that only take part in gathering.
    """
    tensors, header, end = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        size = np.dtype(dtype).itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which wants alignment
    if path is None:
        for name, _, _ in tensors:
            fetch(name)
        return
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in tensors:
            array = np.asarray(fetch(name), dtype, order="C")
            assert array.shape == tuple(shape), (name, array.shape, shape)
            file.write(array.reshape(-1).view(np.uint8).data)


def writable(dtype: Any) -> bool:
    return np.dtype(dtype) in _CODES
