"""Compiled programs are kept on disk: the same command compiles nothing when it starts again."""

import hashlib
import os
import pathlib
import platform

import jax

# JAX's own default, 1 s, would leave out most programs of a start; together they take as long as the step's.
_LEAST_SECONDS = 0.1


def keep_programs() -> None:
    """Has JAX keep what it compiles in `$LUTHIER_CACHE/compiled` (default `~/.cache/luthier/compiled`).

    Call it after the processes of a run have joined and before anything is compiled. A program is found
    again by its content, the compiler's version and the devices. JAX's own settings win:
    `JAX_COMPILATION_CACHE_DIR` is another folder, `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing. A folder
    that cannot be written is not used.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = os.path.join(os.environ.get("LUTHIER_CACHE") or "~/.cache/luthier", "compiled")
    if jax.default_backend() == "cpu":
        folder = os.path.join(folder, _processor())
    if "://" not in folder:
        folder = os.path.expanduser(folder)
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _processor() -> str:
    """A name for this kind of processor: JAX would offer its code to any other, which may lack an instruction."""
    try:
        lines = set(pathlib.Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        lines = {f"model name: {platform.processor()}"}
    told = sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return f"{platform.machine()}-{hashlib.blake2b(repr(told).encode(), digest_size=4).hexdigest()}"
