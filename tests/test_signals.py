"""Signals: one process stops after its step; several stop after the same one."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

from luthier.training import maintenance
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


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata server whose values the test gives one by one; a version is the number of values so far."""

    values: list[str]
    changed = threading.Condition()

    def do_GET(self):
        address = urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(address.query))
        assert address.path == "/computeMetadata/v1/instance/maintenance-event"
        assert self.headers["Metadata-Flavor"] == "Google"
        with self.changed:
            if asked.get("wait_for_change") == "true":
                self.changed.wait_for(lambda: asked["last_etag"] != str(len(self.values)), float(asked["timeout_sec"]))
            value, etag = self.values[-1], str(len(self.values))
        self.send_response(200)
        self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(value.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    """Says another value to those who ask."""
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        monkeypatch.setattr(maintenance, "WAIT_S", 1)

        def say(*values):
            with Metadata.changed:
                Metadata.values = [*getattr(Metadata, "values", []), *values]
                Metadata.changed.notify_all()

        Metadata.values = []
        yield say
        server.shutdown()


def stops(preemption, within_s):
    until = time.monotonic() + within_s
    while not preemption.requested(1) and time.monotonic() < until:
        time.sleep(0.02)
    return preemption.requested(1)


def test_a_notice_of_maintenance_asks_the_loop_to_stop(metadata):
    metadata("NONE")
    with Preemption() as preemption:
        assert not stops(preemption, 1.5)  # Longer than one question waits.
        metadata("MIGRATE_ON_HOST_MAINTENANCE")
        assert not stops(preemption, 0.3)
        metadata("TERMINATE_ON_HOST_MAINTENANCE")
        assert stops(preemption, 20)


def test_a_notice_that_stood_before_stops_nothing(metadata):
    metadata("TERMINATE_ON_HOST_MAINTENANCE")
    with Preemption() as preemption:
        assert not stops(preemption, 1.5)
        metadata("NONE")
        assert not stops(preemption, 2.5)  # So that it is seen: after an unchanged answer a second passes.
        metadata("TERMINATE_ON_HOST_MAINTENANCE")
        assert stops(preemption, 20)


def test_a_metadata_server_that_does_not_answer_stops_nothing(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "localhost:1")
    with Preemption() as preemption:
        assert not stops(preemption, 0.3)


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
