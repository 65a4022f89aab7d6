"""One error for every mistake that has a mend.

A `LuthierError` is for the person who made the mistake: where it is (file, line or config
key), what was given, what was expected, and what to do. The command line prints it as one line
without a traceback; in Python it is an ordinary exception.
"""

import difflib
from collections.abc import Iterable


class LuthierError(Exception):
    """A mistake in what the user gave, with the place and the mend.

    Args:
      what: what is wrong, with the value given and the value expected; no final full stop.
      where: file, `file:line`, or config key.
      mend: what to do about it, as an imperative.
    """

    def __init__(self, what: str, *, where: object = None, mend: str | None = None):
        self.what, self.where, self.mend = what, where, mend
        text = f"{where}: {what}" if where else what
        super().__init__(
            ". ".join(part.rstrip(".") for part in (text, mend) if part) + ("" if mend and mend.endswith("?") else ".")
        )


def near(name: str, known: Iterable[str]) -> str:
    """Names the known words nearest to a misspelt one, for the `mend` of an error."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(known)}"
