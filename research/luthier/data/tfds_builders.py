"""TFDS datasets as records by index, read without TensorFlow.

ArrayRecord and Parquet datasets are read through TFDS's own random access; TFRecord, which has
none, shard by shard.
"""

import contextlib
import functools
import hashlib
import os
import re
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from luthier.errors import LuthierError, near

_NAME = r"\w+(?:/[^:/\[\]]+)*(?::\d+\.\d+\.\d+)?"
_FOLDER = r"(?:\w+://|[/.~])[^:\[\]]*"
_SOURCE = re.compile(rf"tfds:(?:(?P<folder>{_FOLDER})|(?P<name>{_NAME}))(?::(?P<split>.+))?")


class TfdsRecords:
    """One split of a prepared dataset.

    A record has the dataset's features as plain Python: bytes are UTF-8 text, class labels their
    names, arrays lists, and a sequence of several features (as of `role` and `content`) a list of
    objects.

    Args:
      builder: a `tfds.core.DatasetBuilder` whose data are prepared.
      split: in TFDS's syntax, as `train`, `train[:10%]` or `train+test`.
    """

    def __init__(self, builder: Any, split: str):
        self.name = f"tfds:{builder.info.full_name}:{split}"
        self._features = builder.info.features
        files = builder.info.splits[split].file_instructions
        formats = {str(file.filename).rpartition("/")[2].split(".")[1].split("-")[0] for file in files}
        random_access = "tfrecord" not in formats
        self._raw = builder.as_data_source(split) if random_access else _TfRecords(files, self._features)
        self.fingerprint = _fingerprint(builder, split, files)

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {key: _plain(value, self._features[key]) for key, value in self._raw[index].items()}
        except UnicodeDecodeError as error:
            what = f"not UTF-8: {error.reason} at byte {error.start} of {error.object[:20]!r}"
            raise LuthierError(what, where=self.where(index), mend="Only text can be trained on") from None

    def where(self, index: int) -> str:
        return f"{self.name}: record {index}"


def open_source(source: str) -> TfdsRecords:
    """The records of `tfds:NAME[:SPLIT]` or `tfds:FOLDER[:SPLIT]`.

    `NAME` is TFDS's, as `gsm8k`, `glue/mrpc` or `glue/mrpc:2.0.0`, looked for in `$TFDS_DATA_DIR`
    (default `~/tensorflow_datasets`); `FOLDER` is the one that holds `dataset_info.json`, local or
    `gs://`. `SPLIT` is `train` unless given. Nothing is downloaded here.

    Raises:
      LuthierError: tensorflow-datasets is not installed; no such dataset or split; not prepared.
    """
    parsed = _SOURCE.fullmatch(source)
    if parsed is None:
        raise LuthierError(
            "not a TFDS name", where=source, mend="Write tfds:NAME/CONFIG:VERSION:SPLIT or tfds:FOLDER:SPLIT"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise LuthierError(
            f"needs tensorflow-datasets ({error})", where=source, mend="pip install 'luthier[tfds]'"
        ) from None
    builder = (
        _from_folder(tfds, parsed["folder"], source) if parsed["folder"] else _by_name(tfds, parsed["name"], source)
    )
    split = parsed["split"] or "train"
    try:
        return TfdsRecords(builder, split)
    except (KeyError, ValueError, AssertionError) as error:
        known = list(builder.info.splits)
        if re.split(r"[\[+]", split)[0] in known:
            raise LuthierError(" ".join(str(error).strip("'\"").split()), where=source) from error
        raise LuthierError(f"no split {split!r}", where=source, mend=near(split, known)) from None


def _from_folder(tfds: Any, folder: str, source: str) -> Any:
    path = epath.Path(folder).expanduser()
    if not (path / "dataset_info.json").exists():
        inside = [
            os.fspath(found.parent) for depth in (1, 2, 3) for found in path.glob("*/" * depth + "dataset_info.json")
        ]
        mend = f"Name one of {', '.join(sorted(inside)[:4])}" if inside else "Name the folder of one version"
        raise LuthierError("no dataset_info.json in this folder", where=source, mend=mend)
    return tfds.builder_from_directory(path)


def _by_name(tfds: Any, name: str, source: str) -> Any:
    data_dir = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    command = f"tfds build {name} --data_dir={data_dir} --file_format=array_record"
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir))
    except tfds.core.DatasetNotFoundError:
        raise LuthierError(
            f"no dataset {name!r} in {data_dir}, and TFDS knows none of that name",
            where=source,
            mend="Set TFDS_DATA_DIR, or name its folder, as in tfds:FOLDER:SPLIT",
        ) from None
    except Exception as error:  # an unknown version or configuration, a dataset's own import
        raise LuthierError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", where=source) from error
    if not builder.info.splits:
        raise LuthierError(f"{name!r} is not prepared in {data_dir}", where=source, mend=f"Run {command}")
    return builder


class _TfRecords:
    """Random access to TFRecord shards; the two that were read last stay in memory."""

    def __init__(self, files: Sequence[Any], features: Any):
        self._files, self._features = list(files), features
        self._ends = np.cumsum([file.take if file.take >= 0 else file.examples_in_shard - file.skip for file in files])
        self._lock = threading.Lock()
        self._shard = functools.lru_cache(maxsize=2)(_records)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        file = self._files[which]
        within = index - (int(self._ends[which - 1]) if which else 0) + file.skip
        with self._lock:
            record = self._shard(os.fspath(file.filename))[within]
        return self._features.deserialize_example_np(record)


def _records(path: str) -> list[bytes]:
    """The records of a TFRecord file: each has its length (u64), a checksum (u32), itself, a checksum."""
    data, position, records = epath.Path(path).read_bytes(), 0, []
    while position < len(data):
        start = position + 12
        length = struct.unpack_from("<Q", data, position)[0] if start <= len(data) else len(data)
        position = start + length + 4
        if position > len(data):
            raise LuthierError(f"ends inside record {len(records)}", where=path, mend="Prepare the dataset again")
        records.append(data[start : start + length])
    return records


def _fingerprint(builder: Any, split: str, files: Sequence[Any]) -> str:
    """Of what describes the dataset, and of the names and sizes of the files read."""
    digest = hashlib.blake2b(split.encode(), digest_size=16)
    folder = epath.Path(builder.data_path)
    for name in ("dataset_info.json", "features.json"):
        with contextlib.suppress(FileNotFoundError):
            digest.update((folder / name).read_bytes())
    for file in files:
        path = epath.Path(file.filename)
        digest.update(f"{path.name} {path.stat().length} {file.skip} {file.take}".encode())
    return digest.hexdigest()


def _plain(value: Any, feature: Any) -> Any:
    """A decoded feature as JSON would have it."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: _plain(item, feature[key]) for key, item in value.items()}
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.FeaturesDict):
        columns = {key: list(column) for key, column in value.items()}
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        return [_plain(row, feature.feature) for row in rows]
    if isinstance(feature, tfds.features.Dataset):
        return [_plain(item, feature.feature) for item in value]
    if isinstance(feature, tfds.features.Sequence):
        return [_plain(item, feature.feature) for item in value]
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value)) if value >= 0 else None
    return _unwrapped(value)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return _unwrapped(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    return [_unwrapped(item) for item in value] if isinstance(value, list) else value
