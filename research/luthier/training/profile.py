"""A trace of a few steps, for TensorBoard's profiler, XProf or Perfetto."""

import re
from typing import Any

import jax
from etils import epath

from luthier.errors import LuthierError


class Profile:
    """Traces the steps from `first` to `last`, counted from 1 over all stages, into `folder`.

    with Profile(folder, 10, 12) as profile:
        for step in …:
            profile.before(step)
            state = …
            profile.after(step, state)
    """

    def __init__(self, folder: epath.PathLike, first: int = 0, last: int = 0):
        self._folder, self._first, self._last, self._running = str(folder), first, last, False

    @classmethod
    def parse(cls, folder: epath.PathLike, span: str) -> "Profile":
        """From `START:STOP`; the empty string traces nothing."""
        found = re.fullmatch(r"(\d+):(\d+)", span)
        if span and (not found or not 1 <= int(found[1]) <= int(found[2])):
            raise LuthierError(
                f"not a span of steps: {span!r}", where="--profile", mend="Write START:STOP, as in 10:12"
            )
        return cls(folder, int(found[1]), int(found[2])) if found else cls(folder)

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace after the last step, when its `result` is there."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.__exit__()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
