"""SeqIO tasks and mixtures, built once into Parquet files of token ids.

TensorFlow runs only while a task is built. Training reads the files by index like any other
records, so order, packing and resume are ours and the same on any number of processes.
"""

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from luthier.data import sources
from luthier.errors import LuthierError, near

_ROWS = 4096  # rows of a Parquet row group, which is what a reader keeps in memory
_EXAMPLES = "examples.parquet"
_LAYOUT = 1  # of what a build writes; a change of it makes old builds stale


@dataclasses.dataclass(frozen=True)
class Task:
    """What is known of a task's examples on disk.

    Attributes:
      source: names it alone, as `seqio:MODULE#TASK:SPLIT`.
      rate: its share of what was asked for; the shares of a mixture add up to 1.
      path: Parquet file of records `input_ids` and `completion_mask` (1 on the targets).
      examples: how many.
      vocabulary: what the task calls its vocabulary.
      vocab_size, eos_id: of that vocabulary.
      tokenizer: fingerprint of the tokenizer under an `HFVocabulary`; None for other vocabularies.
      largest_id: largest token id that occurs.
    """

    source: str
    rate: float
    path: str
    examples: int
    vocabulary: str
    vocab_size: int
    eos_id: int | None
    tokenizer: str | None
    largest_id: int


class HasVocabulary(Protocol):
    """What `check_vocabulary` needs of a tokenizer."""

    fingerprint: str
    vocab_size: int
    eos_id: int | None


def parts(source: str, *, cache_dir: str | os.PathLike | None = None) -> tuple[Task, ...]:
    """The tasks of `seqio:[MODULE#]NAME[:SPLIT]`, built where that was not done before.

    `MODULE` is imported first, so that it registers `NAME`: a dotted module or the path of a `.py`
    file. `NAME` is a task or a mixture, whose tasks are built one by one and keep its rates; those
    without the split are left out, as in SeqIO. `SPLIT` is `train` unless given.

    An example is the ids of `inputs`, then those of `targets`, as the task's vocabulary and
    preprocessors made them: nothing is added (no BOS, no EOS) and nothing trimmed. Each task is
    built twice; one whose examples differ is refused, because order, packing and resume rest on
    what is read by index.

    A build is kept under `cache_dir`; it is made anew when the module's file, the installed versions
    of seqio and TensorFlow, or the files that the task reads have changed. A machine without
    TensorFlow reads a build that was copied there.

    Raises:
      LuthierError: seqio is not installed; unknown module, name or split; a failing, stateful or
        random task; features that are not token ids; empty targets.
    """
    index, folder = _built(source, cache_dir)
    if "task" in index:
        return (Task(source=source, rate=1.0, path=os.fspath(folder / _EXAMPLES), **index["task"]),)
    tasks = [(parts(part, cache_dir=cache_dir)[0], rate) for part, rate in index["parts"]]
    return tuple(dataclasses.replace(task, rate=rate) for task, rate in tasks)


def open_source(source: str, *, cache_dir: str | os.PathLike | None = None) -> sources.Source:
    """The records of one task.

    Raises:
      LuthierError: what `parts` raises; or the source is a mixture.
    """
    found = parts(source, cache_dir=cache_dir)
    if len(found) > 1:
        names = ", ".join(task.source for task in found)
        raise LuthierError("this is a mixture, expected one task", where=source, mend=f"Name one of {names}")
    return sources.ParquetRecords(found[0].path, found[0].source)


def check_vocabulary(task: Task, tokenizer: HasVocabulary) -> str | None:
    """A remark if a task's ids may not be the model's, None if they surely are.

    Raises:
      LuthierError: an id that the tokenizer does not have.
    """
    if task.largest_id >= tokenizer.vocab_size:
        raise LuthierError(
            f"token id {task.largest_id} of {task.vocabulary}; the model's tokenizer has {tokenizer.vocab_size} ids",
            where=task.source,
            mend="Give the task's features luthier.data.vocabulary.HFVocabulary over the model's tokenizer",
        )
    if task.tokenizer == tokenizer.fingerprint:
        return None
    differ = (
        [f"{task.vocab_size} ids against {tokenizer.vocab_size}"] if task.vocab_size != tokenizer.vocab_size else []
    )
    differ += [f"EOS {task.eos_id} against {tokenizer.eos_id}"] if task.eos_id != tokenizer.eos_id else []
    how = f" ({', '.join(differ)})" if differ else ""
    return (
        f"{task.source} was tokenised by {task.vocabulary}, not by the model's tokenizer{how}; "
        "its ids are taken as they are"
    )


def _built(source: str, cache_dir: str | os.PathLike | None) -> tuple[dict[str, Any], pathlib.Path]:
    """The index of a build, made now if there is none that is fresh, and its folder."""
    module, name = _parse(source)
    folder = pathlib.Path(cache_dir or sources.default_cache_dir()) / "seqio" / _key(source, module)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine builds, the others wait for it
        if not (folder / "index.json").exists() or not _is_fresh(folder):
            _build(source, module, name, folder)
    return json.loads((folder / "index.json").read_text()), folder


def _parse(source: str) -> tuple[str, str]:
    """The module ("" for none) and the name, with its split."""
    rest = source.removeprefix("seqio:")
    module, hash_, name = rest.partition("#")
    if not hash_:
        module, name = "", rest
    if not name:
        raise LuthierError("no task or mixture is named", where=source, mend="Write seqio:MODULE#NAME:SPLIT")
    return module, name


def _key(source: str, module: str) -> str:
    """Names the folder of a build by all that can be told without importing TensorFlow."""
    digest = hashlib.blake2b(f"{_LAYOUT} {source}".encode(), digest_size=8)
    file = _file_of(module, source)
    digest.update(file.read_bytes() if file else b"")
    readable = "".join(c if c.isalnum() else "-" for c in source.rpartition("#")[2].removeprefix("seqio:"))
    return f"{readable}-{digest.hexdigest()}"


def _file_of(module: str, source: str) -> pathlib.Path | None:
    if not module:
        return None
    if module.endswith(".py"):
        path = pathlib.Path(module).expanduser()
        if not path.is_file():
            raise LuthierError(f"no file {module}", where=source, mend="Write seqio:FILE.py#NAME:SPLIT")
        return path
    with contextlib.suppress(ModuleNotFoundError):
        found = importlib.util.find_spec(module)
        if found:
            return pathlib.Path(found.origin) if found.has_location else None
    raise LuthierError(
        f"no module {module!r}",
        where=source,
        mend=f"Install it, or name its file, as in seqio:{module.split('.')[-1]}.py#NAME",
    )


def _is_fresh(folder: pathlib.Path) -> bool:
    index = json.loads((folder / "index.json").read_text())
    same_files = all(_state(path) == state for path, state in index["reads"].items())
    return same_files and all(_version(package) in (None, version) for package, version in index["versions"].items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(path: str) -> list[int] | None:
    """Size and time of a file, or None where there is none: a task without files calls its shards by the split."""
    try:
        status = epath.Path(path).stat()
    except OSError:
        return None
    return None if status.is_directory else [status.length, int(status.mtime)]


def _build(source: str, module: str, name: str, folder: pathlib.Path) -> None:
    seqio = import_seqio(source)
    _register(module, source)
    found, split = _find(seqio, name, source)
    if split not in found.splits:
        raise LuthierError(f"{found.name!r} has no split {split!r}", where=source, mend=near(split, found.splits))
    if isinstance(found, seqio.Task):
        tasks = [found]
        index = {"task": {**_write_twice(found, split, folder / _EXAMPLES, source), **_vocabulary(found, source)}}
    else:
        tasks = [task for task in found.tasks if split in task.splits]
        names = [f"seqio:{module}#{task.name}:{split}" for task in tasks]
        index = {"parts": [part for part in zip(names, _rates(found, tasks, source)) if part[1] > 0]}
    index["reads"] = {os.fspath(path): _state(path) for task in tasks for path in task.source.list_shards(split)}
    index["versions"] = {package: _version(package) for package in ("seqio", "tensorflow", "tensorflow-text")}
    partial = folder / "index.json.partial"
    partial.write_text(json.dumps(index, indent=1))
    os.replace(partial, folder / "index.json")


def import_seqio(where: str) -> Any:
    """The module `seqio`, with TensorFlow kept off the accelerators."""
    try:
        import seqio
        import tensorflow as tf
    except ImportError as error:
        raise LuthierError(
            f"needs seqio and TensorFlow ({error})", where=where, mend="pip install 'luthier[seqio]'"
        ) from None
    with contextlib.suppress(RuntimeError):  # it is up already, and holds what it holds
        tf.config.set_visible_devices([], "GPU")  # or it takes the whole memory that jax computes in
    return seqio


def _register(module: str, source: str) -> None:
    file = _file_of(module, source)
    try:
        if file is None or not module.endswith(".py"):
            _ = module and importlib.import_module(module)
            return
        name = f"luthier_tasks_{hashlib.blake2b(os.fspath(file.resolve()).encode(), digest_size=8).hexdigest()}"
        if name in sys.modules:
            return
        found = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    except Exception as error:
        raise LuthierError(f"{module} fails to import ({type(error).__name__}: {error})", where=source) from error


def _find(seqio: Any, name: str, source: str) -> tuple[Any, str]:
    """The task or mixture, and the split. A registered name may hold colons itself, so it goes first."""
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    shorter, _, split = name.rpartition(":")
    for candidate, its_split in ((name, "train"), (shorter, split)):
        if candidate in known:
            return seqio.get_mixture_or_task(candidate), its_split
    mend = near(shorter or name, known) if known else "Name the module that registers it: seqio:MODULE#NAME:SPLIT"
    raise LuthierError(f"no task or mixture {(shorter or name)!r} is registered", where=source, mend=mend)


def _rates(mixture: Any, tasks: Sequence[Any], source: str) -> list[float]:
    try:
        rates = [float(mixture.get_rate(task)) for task in tasks]
    except Exception as error:  # a rate may be any function of the task
        raise LuthierError(f"the rates of {mixture.name!r} cannot be told ({error})", where=source) from error
    if min(rates) < 0 or not sum(rates) > 0:
        raise LuthierError(f"the rates of {mixture.name!r} are {rates}", where=source, mend="Give positive rates")
    return [rate / sum(rates) for rate in rates]


def _vocabulary(task: Any, source: str) -> dict[str, Any]:
    features = task.output_features
    used = [features[key].vocabulary for key in ("inputs", "targets") if key in features]
    if used[0] != used[-1]:
        raise LuthierError(
            f"task {task.name!r} has one vocabulary for inputs and another for targets",
            where=source,
            mend="A decoder has one",
        )
    vocabulary = used[-1]
    return {
        "vocabulary": type(vocabulary).__name__,
        "vocab_size": int(vocabulary.vocab_size),
        "eos_id": vocabulary.eos_id,
        "tokenizer": getattr(vocabulary, "fingerprint", None),
    }


def _write_twice(task: Any, split: str, path: pathlib.Path, source: str) -> dict[str, int]:
    """Writes a task's examples, then builds them again to see whether they are the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digests, largest = array.array("Q"), -1
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "completion_mask": pa.list_(pa.int8())})
    partial = path.with_suffix(".partial")
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            examples = _examples(task, split, source)
            while rows := list(itertools.islice(examples, _ROWS)):
                columns = {name: list(column) for name, column in zip(schema.names, zip(*rows))}
                writer.write_table(pa.table(columns, schema))
                digests.extend(_digest(*row) for row in rows)
                largest = max(largest, *(int(ids.max()) for ids, _ in rows))
        again = itertools.zip_longest(digests, (_digest(*row) for row in _examples(task, split, source)))
        differing = next((number for number, (first, second) in enumerate(again) if first != second), None)
        if differing is not None:
            raise LuthierError(
                f"task {task.name!r} is random or keeps state: built a second time, its split {split!r} differs "
                f"at example {differing}",
                where=source,
                mend="Take what is random out of its preprocessors, or fix it by the example's content",
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return {"examples": len(digests), "largest_id": largest}


def _digest(ids: np.ndarray, mask: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=8).digest(), "little")


def _examples(task: Any, split: str, source: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and completion mask of each example, in the order of the task's files."""
    try:
        dataset = task.get_dataset(
            split=split, shuffle=False, num_epochs=1, use_cached=task.requires_caching, try_in_mem_cache=False
        )
        for number, example in enumerate(dataset.as_numpy_iterator()):
            features = {key: example[key] for key in task.output_features if key in example}
            yield _concatenated(features, f"{source}: example {number}")
    except LuthierError:
        raise
    except Exception as error:  # preprocessors are the user's, and TensorFlow's errors many
        first = (str(error).strip() or "no message").splitlines()[0]
        raise LuthierError(f"task {task.name!r} fails ({type(error).__name__}: {first})", where=source) from error


def _concatenated(features: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    if "targets" not in features:
        raise LuthierError(f"the task's features are {', '.join(features)}; expected targets", where=where)
    pieces = []
    for key in ("inputs", "targets"):
        ids = np.asarray(features.get(key, np.zeros(0, np.int32)))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            kind = "text" if ids.dtype.kind in "OSU" else f"{ids.dtype} of rank {ids.ndim}"
            raise LuthierError(
                f"{key!r} is {kind}, expected a list of token ids",
                where=where,
                mend="End the task's preprocessors with seqio.preprocessors.tokenize",
            )
        pieces.append(ids.astype(np.int32))
    if not len(pieces[1]):
        raise LuthierError("'targets' is empty", where=where, mend="Filter such examples, or append EOS")
    return np.concatenate(pieces), np.repeat(np.int8([0, 1]), [len(piece) for piece in pieces])
