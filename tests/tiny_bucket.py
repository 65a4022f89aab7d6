"""`gs://bucket/…` as a local folder, through epath's own mocking of its backends."""

import contextlib
import os

from etils import epath


@contextlib.contextmanager
def bucket(folder):
    """While open, `gs://bucket/x` is `folder/x` for everything that goes through `epath`."""

    def real(name):
        return os.fspath(name).replace("gs://bucket", str(folder))

    def stat(original, path):
        found = os.stat(real(path))
        return epath.stat_utils.StatResult(
            is_directory=os.path.isdir(real(path)),
            length=found.st_size,
            mtime=int(found.st_mtime),
            owner=None,
            group=None,
            mode=0,
        )

    with epath.testing.mock_epath(
        open=lambda original, path, *args, **kwargs: open(real(path), *args, **kwargs),
        exists=lambda original, path: os.path.exists(real(path)),
        isdir=lambda original, path: os.path.isdir(real(path)),
        makedirs=lambda original, path, **_: os.makedirs(real(path), exist_ok=True),
        stat=stat,
    ):
        yield
