"""Compiles the real train step for TPU slices that are not here, and tabulates what it needs.

    pip install -e '.[aot]' && python benchmarks/aot.py               # all rows, some minutes each; 2.5 GiB of memory
    python benchmarks/aot.py llama3-8b-full-v5e:4x4                   # some of them, by name
    python benchmarks/aot.py --table                                  # none: the table of docs/scaling.md

Sequence 4096 and one sequence a chip unless the row says otherwise, AdamW with a bfloat16 first moment, bfloat16
activations, full remat but where the row says `remat=dots`. Each row is a process of its own; finished rows stay in
`results/aot.json` when others are run again.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from importlib import metadata

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = pathlib.Path(__file__).parent / "results" / "aot.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """One compilation; `bar` is the peak in GiB a chip that it should not exceed, where one was set beforehand."""

    model: str
    tune: str
    topology: str
    batch: int
    bar: float | None = None
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        more = "".join(f"-{override.rpartition('.')[2]}" for override in self.overrides)
        return f"{self.model}-{self.tune}-{self.topology}-batch={self.batch}{more}"


KEPT = ("model.remat=dots",)
LONG = ("stages[0].sequence_length=131072", "mesh.sequence=32")
ROWS = (
    Row("llama3-8b", "full", "v5e:4x4", 16, 10.5),
    Row("llama3-8b", "full", "v5e:4x4", 32, 13.0),
    Row("llama3-8b", "full", "v5e:8x8", 64, 6.0),
    Row("llama3-8b", "full", "v5p:2x2x2", 8, 17.5),
    Row("llama3-8b", "full", "v5p:2x2x2", 8, overrides=KEPT),
    Row("llama3-8b", "full", "v5e:16x16", 256),
    Row("llama3-8b", "lora", "v5e:2x4", 8),
    Row("llama3-70b", "lora", "v5e:8x8", 64, 12.0),
    Row("llama3-70b", "full", "v5p:4x4x4", 64, 28.5),
    Row("llama3-70b", "full", "v5p:2x4x4", 32),
    Row("qwen3-1.7b", "full", "v5e:2x2", 4),
    Row("qwen3-1.7b", "full", "v5e:2x2", 4, overrides=KEPT),
    Row("qwen3-1.7b", "full", "v6e:2x2", 4),
    Row("gemma3-4b", "lora", "v5e:2x2", 4),
    Row("smollm2-135m", "full", "v5e:1x1", 1),
    Row("smollm2-135m", "full", "v6e:1x1", 1),
    Row("llama3-8b", "full", "v6e:16x16", 8, overrides=LONG),
    Row("llama3-8b", "otr", "v5e:4x4", 16),
    Row("llama3-8b", "asft", "v5e:4x4", 16),
    Row("llama3-8b", "dpo", "v5e:4x4", 16),
    Row("llama3-8b", "dpo", "v5e:4x4", 16, overrides=("stages[0].cache_reference=False",)),
    Row("llama3-8b", "prompt", "v5e:2x4", 8),
    Row("llama3-8b", "promot", "v5e:4x4", 16),
)


def measure(row: Row) -> dict:
    """Runs `luthier compile-check` and reads what it wrote."""
    out = RESULTS.with_name(f".{row.name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "luthier", "compile-check", f"--config={ROOT}/configs/pod.py:{row.tune}"]
    command += [f"--model={row.model}", f"--topology={row.topology}", f"--out={out}"]
    command += [f"--config.stages[0].batch_size={row.batch}", *(f"--config.{one}" for one in row.overrides)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TPU_SKIP_MDS_QUERY": "1"})
    if done.returncode not in (0, 1):
        return {"name": row.name, "error": done.stderr[-1000:]}
    versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
    record = {"name": row.name, "bar_gib": row.bar, "versions": versions, **json.loads(out.read_text())}
    out.unlink()
    return record


def main() -> None:
    wanted = sys.argv[1:]
    if wanted == ["--table"]:
        print(table(json.loads(RESULTS.read_text())))
        return
    records = {one["name"]: one for one in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for row in ROWS:
        if wanted and not any(row.name.startswith(one) for one in wanted):
            continue
        record = records[row.name] = measure(row)
        print(line(record), flush=True)
        order = [one.name for one in ROWS]
        known = [one for one in records.values() if one["name"] in order]
        rows = sorted(known, key=lambda one: order.index(one["name"]))
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def table(records: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | slice, mesh | tokens a step | GiB a chip | bar | bound s | by | MFU | received GB | compiled s |"
    ]
    lines.append("|---|---|--:|--:|--:|--:|---|--:|--:|--:|")
    for record in records:
        row = next(row for row in ROWS if row.name == record["name"])
        changed = "".join(f", {one.rpartition('.')[2]}" for one in row.overrides if one not in LONG)
        start = f"| {row.model}, {row.tune}{changed} | {record['topology']}"
        if record.get("peak") is None:
            lines.append(
                f"{start} | {record['tokens']:,} | {record['refusal']} | {record['bar_gib'] or ''} |" + " |" * 5
            )
            continue
        mesh = " ".join(f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1)
        bound, by = max((seconds, name) for name, seconds in record["bounds"].items())
        talk = record["collectives"]
        received = "unavailable" if talk is None else f"{sum(one['wire_bytes'] for one in talk) / 1e9:.1f}"
        cells = [
            f"{record['tokens']:,}",
            f"{record['peak'] / 2**30:.2f}",
            f"{record['bar_gib'] or ''}",
            f"{bound:.2f}",
            by,
        ]
        cells += [f"{record['bound_mfu']:.0%}", received, f"{record['compile_seconds']:.0f}"]
        lines.append(f"{start} {mesh} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def line(record: dict) -> str:
    if "error" in record:
        return f"{record['name']:44} {record['error'].splitlines()[-1]}"
    if record["peak"] is None:
        return f"{record['name']:44} {record['refusal']}, {record['compile_seconds']:.0f} s"
    memory = f"{record['peak'] / 2**30:6.2f} GiB (bar {record['bar_gib'] or '–'})"
    bound = f"bound {record['bound_seconds']:.2f} s, MFU {record['bound_mfu']:.0%}"
    return f"{record['name']:44} {memory}, {bound}, compiled in {record['compile_seconds']:.0f} s"


if __name__ == "__main__":
    main()
