"""The start of a run of several processes: JAX's own multi-controller runtime, nothing of ours."""

import os

import jax


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
