"""Stopping between two steps when the machine is wanted back: save, exit 75, go on later."""

import logging
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from luthier.training import maintenance

log = logging.getLogger(__name__)

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command will succeed if run again.


class Preempted(Exception):
    """A signal asked to stop; everything up to `step` is saved and the same command goes on."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped after step {step} as asked; the same command goes on from there")


class Preemption:
    """Notes SIGTERM, the first Ctrl-C and Google Cloud's notice of maintenance, for a loop to stop at after its step.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.requested(step): save and raise Preempted(step)

    With several processes, a signal to any one stops all at the same step: JAX's preemption
    service carries it through the coordinator in the background, so no step waits for another
    process. A second Ctrl-C interrupts at once. Outside the main thread no signals are taken.
    """

    def __enter__(self) -> "Preemption":
        self._stop = False
        self._before: dict[int, object] = {}
        # The service has its own handler of SIGTERM, which one of ours would replace.
        self._agreed = jax.distributed.is_initialized()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._agreed else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        self._notices = maintenance.Notices(self._ask) if maintenance.on_google_cloud() else None
        return self

    def __exit__(self, *error) -> None:
        if self._notices:
            self._notices.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to save and stop now; with several processes, true on all at the same step.

        Args:
          step: updates of the whole run; every process asks after every one.
        """
        if self._agreed and not self._stop:
            self._stop = multihost_utils.reached_preemption_sync_point(step)
        return self._stop

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning("Stopping after this step; press Ctrl-C again to stop at once.")
        self._ask()

    def _ask(self) -> None:
        if self._agreed:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._stop = True
