"""Start and end of a run of several processes: JAX's own multi-controller runtime, nothing of ours."""

import os
import sys
import time
import traceback

import jax

# How long process 0, whose end ends the others, lets them tell what they found.
LAST_WORDS = 5.0


def start() -> None:
    """Joins the other processes of the run, where the environment says that there are some.

    Call it before anything touches a device. It acts on a TPU pod (`TPU_WORKER_HOSTNAMES`), under
    SLURM with several tasks, and anywhere else when a launcher sets `JAX_COORDINATOR_ADDRESS`
    (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
    """
    if jax.distributed.is_initialized():
        return
    if "JAX_COORDINATOR_ADDRESS" in os.environ and "JAX_PROCESS_ID" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()


def leave(code: int, error: Exception | None = None) -> None:
    """Ends this process at once if it is one of several, after the traceback of an error.

    At a regular exit JAX waits minutes for the other processes, and they may wait in a collective for this one;
    once it is gone they fail too. Call it when an error ends the run; with one process it does nothing.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if error is not None:
        traceback.print_exception(error)
    if jax.process_index() == 0:
        time.sleep(LAST_WORDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_another(error: BaseException | None) -> str | None:
    """What JAX says if an error is the end of another process of the run; None for any other error."""
    while error is not None and jax.distributed.is_initialized():
        text = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in _LOST):
            return text.splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


_LOST = ("Gloo", "Connection closed by peer", "Connection reset by peer", "heartbeat", "another task died")
