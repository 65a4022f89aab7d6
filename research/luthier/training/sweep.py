"""Many runs of one recipe: a command for each point, run here or handed on, and one table of all.

A config file's `get_sweep()` gives the points, dicts of overrides such as
`{"stages[0].schedule.peak": 1e-3, "seed": 1}`. Points are independent processes, so a failure or a
kill costs one of them, and the same command later runs only what is missing.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from luthier import config as configs
from luthier.errors import LuthierError
from luthier.reporting.workdir import read_run
from luthier.training.files import write_atomic
from luthier.training.signals import EXIT_PREEMPTED

LOG = "sweep.jsonl"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its workdir, such as `002-peak=0.001-seed=1`.
      overrides: {config path: value}.
      command: words to run, the launcher's prefix first.
    """

    name: str
    overrides: Mapping[str, Any]
    command: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.command)


def points(
    config: str, workdir: epath.PathLike, overrides: Sequence[str] = (), prefix: Sequence[str] = ()
) -> list[Point]:
    """The points of `get_sweep()`, each checked against the recipe before anything runs.

    Args:
      config: `FILE.py` or `FILE.py:ARG`; ARG is passed to `get_sweep` too if it takes one.
      overrides: `key=value` for every point; the point's own come after them.
      prefix: words before `luthier train …`, such as `sbatch launch/slurm.sh`.

    Raises:
      LuthierError: no `get_sweep()`, a wrong key or value, or two points that are the same.
    """
    configs.load(config, overrides)
    file, _, argument = config.partition(":")
    scope = runpy.run_path(file)
    if "get_sweep" not in scope:
        raise LuthierError("the config file has no get_sweep()", where=file, mend="Let it yield dicts of overrides")
    given = list(scope["get_sweep"](argument) if argument else scope["get_sweep"]())
    if not given:
        raise LuthierError("get_sweep() gives no points", where=file)
    found: dict[str, Point] = {}
    for index, point in enumerate(given):
        words = [*overrides, *(f"{key}={value}" for key, value in point.items())]
        try:
            configs.load(config, words)
        except LuthierError as error:
            raise LuthierError(error.what, where=f"{file}: point {index}: {error.where}", mend=error.mend) from None
        key = json.dumps(_plain(point), sort_keys=True)
        if key in found:
            raise LuthierError(f"points {found[key].name[:3]} and {index:03d} are the same: {key}", where=file)
        name = "-".join([f"{index:03d}", *(_short(key, value) for key, value in point.items())])
        folder = f"{workdir}/{name}"
        flags = [f"--config={config}", f"--workdir={folder}", *(f"--config.{word}" for word in words)]
        found[key] = Point(name, _plain(point), (*prefix, "luthier", "train", *flags))
    return list(found.values())


def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as JSON gives them back."""
    return json.loads(json.dumps(configs.thaw(dict(overrides))))


def _short(key: str, value: Any) -> str:
    """`stages[0].schedule.peak` = 0.001 as `peak=0.001`, of characters that every file system takes."""
    return re.sub(r"[^\w.=+-]", "_", f"{key.rpartition('.')[2]}={value}")[:60]


def done(workdir: epath.PathLike) -> dict[str, Mapping[str, Any]]:
    """{name: overrides} of the points that ended well, from the sweep's log."""
    path = epath.Path(workdir) / LOG
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["name"]: record["overrides"] for record in records if record["exit"] == 0}


def run(
    todo: Iterable[Point], workdir: epath.PathLike, *, jobs: int = 1, tell: Callable[[str], None] = print
) -> dict[str, int]:
    """Runs points as processes, `jobs` at a time, and returns {name: exit code} of those that ended.

    What ended well before is left out; a point that was stopped goes on where it was. Each point's
    output is in `WORKDIR/NAME.log`. A point that fails stops no other; one that was preempted
    (exit 75) stops the sweep after those that run. SIGTERM and the first Ctrl-C reach those that run
    as SIGTERM, at which they save and end; a second Ctrl-C kills them.

    Raises:
      LuthierError: a finished point of this name had other overrides.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    before, todo = done(folder), list(todo)
    handed = [point for point in todo if point.command[0] != "luthier"]  # its exit code only tells of the launcher
    before = {name: point for name, point in before.items() if name not in {point.name for point in handed}}
    before |= {point.name: point.overrides for point in handed if (folder / point.name / "final").is_dir()}
    for point in todo:
        if point.name in before and before[point.name] != point.overrides:
            mend = "Take another --workdir for another sweep"
            raise LuthierError("this point ran with other overrides", where=str(folder / point.name), mend=mend)
    missing = [point for point in todo if point.name not in before]
    if len(missing) < len(todo):
        tell(f"{len(todo) - len(missing)} of {len(todo)} points are done")
    children, lock, codes = _Children(), threading.Lock(), dict.fromkeys(before, 0)

    def one(point: Point) -> None:
        start = time.time()
        code = children.run(_here(point.command), folder / f"{point.name}.log")
        if code is None:
            return
        seconds = time.time() - start
        with lock:
            codes[point.name] = code
            record = {"name": point.name, "overrides": point.overrides, "exit": code}
            old = (folder / LOG).read_text() if (folder / LOG).exists() else ""
            write_atomic(folder / LOG, old + json.dumps({**record, "seconds": round(seconds, 1)}) + "\n")
            said = "done" if code == 0 else f"exit {code}, see {folder / point.name}.log"
            tell(f"{len(codes)}/{len(todo)} {point.name}: {said}, {seconds:.0f} s")
        if code == EXIT_PREEMPTED:
            children.start_no_more()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, children.signalled():
        for future in [pool.submit(one, point) for point in missing]:
            future.result()
    return codes


class _Children:
    """Processes that run at the moment, and whether more of them may start."""

    def __init__(self):
        # A handler of one signal may interrupt that of another.
        self._lock, self._running, self._stopping = threading.RLock(), set(), False

    def run(self, command: Sequence[str], output: epath.Path) -> int | None:
        """Exit code of a command whose output goes to a file, or None if it may not start any more."""
        with self._lock:  # A signal comes before the start or finds the process.
            if self._stopping:
                return None
            with open(output, "ab") as log:
                try:
                    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                except OSError as error:
                    self._stopping = True
                    raise LuthierError(f"could not be started: {error.strerror}", where=command[0]) from error
            self._running.add(child)
        code = child.wait()
        with self._lock:
            self._running.discard(child)
        # Stopped before it could take signals: it starts again like one that saved.
        return EXIT_PREEMPTED if self._stopping and code == -signal.SIGTERM else code

    def start_no_more(self) -> None:
        self._stopping = True

    @contextlib.contextmanager
    def signalled(self) -> Iterator[None]:
        """Passes signals on while points run; outside the main thread none are taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except KeyboardInterrupt:
            self._send(signal.SIGKILL)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # A terminal gives Ctrl-C to the points too, to which a second one would mean the end at once.
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        self._stopping = True
        with self._lock:
            for child in self._running:
                child.send_signal(number)


def _here(command: Sequence[str]) -> list[str]:
    """The command with this environment's `luthier`."""
    return [sys.executable, "-m", "luthier", *command[1:]] if command[0] == "luthier" else list(command)


def collect(todo: Iterable[Point], workdir: epath.PathLike) -> list[dict[str, Any]]:
    """A row a point: its overrides, last loss and every evaluation's last value; what is missing is left out."""
    rows = []
    for point in todo:
        row: dict[str, Any] = {"name": point.name, **{key: str(value) for key, value in point.overrides.items()}}
        if (epath.Path(workdir) / point.name / "manifest.json").exists():
            ran = read_run(epath.Path(workdir) / point.name)
            losses = [record["loss"] for record in ran.metrics if "loss" in record]
            row |= {"steps": len(ran.metrics), **({"loss": losses[-1]} if losses else {})}
            ends = [one for one in ran.evaluations if one.when in ("before", "after")]
            row |= {f"{one.label} ({one.when})": one.value for one in ends}
        rows.append(row)
    return rows
