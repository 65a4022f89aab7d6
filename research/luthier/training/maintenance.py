"""Notices that Google Cloud sends to a machine about an hour before it takes the host away."""

import http.client
import logging
import os
import pathlib
import threading
import urllib.request
from collections.abc import Callable

log = logging.getLogger(__name__)

PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
# The server answers when the value changes, and says the old one again after so many seconds; if it does not answer at
# all, it is asked again after as many.
WAIT_S = 60


def on_google_cloud() -> bool:
    """Whether a metadata server can be asked: on Google's machines, or where GCE_METADATA_HOST names one."""
    return "GCE_METADATA_HOST" in os.environ or (PRODUCT.is_file() and "Google" in PRODUCT.read_text())


class Notices:
    """Calls `announced` once the host is about to be taken away, from a thread in the background.

    Only a notice that comes while it listens counts: a run that stopped for one and was started again on the same
    machine, where the notice still stands, goes on until SIGTERM comes. Machines that move alive
    (MIGRATE_ON_HOST_MAINTENANCE) have nothing to save.

    Source: Compute Engine, "Get live migration notices" and "Query VM metadata" (`wait_for_change`).
    """

    def __init__(self, announced: Callable[[], None]):
        self._announced, self._closed = announced, threading.Event()
        threading.Thread(target=self._listen, name="maintenance-notices", daemon=True).start()

    def close(self) -> None:
        """Calls nothing any more; the thread ends with its request."""
        self._closed.set()

    def _listen(self) -> None:
        value, etag = None, None
        while not self._closed.is_set():
            try:
                before, (value, etag) = value, _ask(etag)
            except (OSError, http.client.HTTPException) as error:
                log.debug("no answer about maintenance: %s", error)
                self._closed.wait(WAIT_S)
                continue
            if value == before:
                self._closed.wait(1)  # Where a server does not wait for a change.
            if not value.startswith("TERMINATE") or value == before or self._closed.is_set():
                continue
            if before is None:
                log.warning("This machine's host is about to be taken away; the run goes on until it is.")
                continue
            log.warning("This machine's host will be taken away: stopping after this step.")
            self._announced()


def _ask(etag: str | None) -> tuple[str, str | None]:
    """The value and its version; with one, waits until the value is another."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    waits = f"?wait_for_change=true&timeout_sec={WAIT_S}&last_etag={etag}" if etag else ""
    asked = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/maintenance-event{waits}", headers={"Metadata-Flavor": "Google"}
    )
    with urllib.request.urlopen(asked, timeout=WAIT_S + 10) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag")
