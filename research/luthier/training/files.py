"""Small files of a workdir, replaced whole: a reader sees the old text or the new one."""

import os

from etils import epath

from luthier.errors import LuthierError


def write_atomic(path: epath.PathLike, text: str) -> None:
    """Replaces a text file in one move; the old one stays if this fails.

    Raises:
      LuthierError: it cannot be written, for instance because the disk is full.
    """
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_local(path):
            new = path.with_name(f".{path.name}.new")
            with open(new, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        else:
            path.write_text(text)  # Object stores show an object only when it is whole.
    except OSError as error:
        raise unwritable(path, error) from error


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is of this machine's file system."""
    return "://" not in os.fspath(path)


def unwritable(path: epath.PathLike, error: OSError) -> LuthierError:
    """The error of a file that cannot be written."""
    return LuthierError(
        f"could not be written: {error.strerror or error}",
        where=os.fspath(path),
        mend="Free some space or mend the permissions, and start the same command again",
    )
