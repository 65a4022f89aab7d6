"""Signals: one process stops after its step; several stop after the same one."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from luthier.training.signals import EXIT_PREEMPTED, Preempted, Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_loop_to_stop(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), number)
        assert preemption.requested(2) and preemption.requested(3)
    assert signal.getsignal(number) is before


def test_the_second_interrupt_is_immediate():
    with Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_outside_the_main_thread_nothing_is_taken():
    answers = []

    def loop():
        with Preemption() as preemption:
            answers.append(preemption.requested(1))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert answers == [False]


def test_the_message_tells_where_it_goes_on():
    assert "step 12" in str(Preempted(12)) and EXIT_PREEMPTED == 75


LOOP = """
import random, sys, time, jax
port, process, first = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
from jax.experimental import multihost_utils
from luthier.training.signals import Preemption
with Preemption() as preemption:
    for step in range(first + 1, first + 2000):
        if step == first + 3:
            print("running", flush=True)
        time.sleep(random.uniform(0.0, 0.02))
        if step % 4 == 0:  # The processes run apart by a few steps, as dispatch ahead of the device lets them.
            multihost_utils.sync_global_devices(str(step))
        if preemption.requested(step):
            break
print("stopped", step, preemption.requested(step + 1), flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("signalled", [0, 1])
def test_two_processes_stop_at_the_same_step(number, signalled):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LOOP, str(port)]
    runs = [
        subprocess.Popen(
            [*command, str(i), "40"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for i in range(2)
    ]
    try:
        assert [run.stdout.readline() for run in runs] == ["running\n"] * 2
        runs[signalled].send_signal(number)
        outputs = [run.communicate(timeout=60) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], [error[-1500:] for _, error in outputs]
    stopped = [out.strip().splitlines()[-1] for out, _ in outputs]
    assert stopped[0] == stopped[1] and stopped[0].startswith("stopped ") and stopped[0].endswith(" True"), outputs
