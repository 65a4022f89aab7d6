"""What a result says of the machine that it was measured on. Linux only (/proc)."""

import os
import pathlib
import platform
from importlib import metadata


def facts(*packages: str) -> dict:
    """Processor, cores, memory, and the versions of Python and of some packages."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "linux": platform.release(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("luthier", *packages)},
    }


def peak_mib() -> float:
    """Peak resident memory of this process, mapped files included (VmHWM)."""
    return int(_field("/proc/self/status", "VmHWM").split()[0]) / 2**10


def _field(file: str, name: str) -> str:
    lines = (line.partition(":") for line in pathlib.Path(file).read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
