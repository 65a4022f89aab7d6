"""Training and generation of Qwen3-1.7B and Llama-3-8B shapes on one NVIDIA GPU, beside transformers and PEFT.

    pip install -e '.[gpu,parity]' && python benchmarks/gpu.py
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --tiny --out=tiny.json        # proves the path anywhere

Random weights, bfloat16 activations, sequence 4096 without padding. `sft` trains every weight, in float32 under
AdamW with (luthier's) bfloat16 first moment; `lora` trains rank 16 on all linear maps over bfloat16 weights; `otr` and
`dpo` are `sft` with one-token rollout and with DPO, each row a pair, beside a bfloat16 reference (step.py);
`generate` continues random prompts greedily in bfloat16. Both sides recompute activations (`--remat=none`: neither).
Every measurement is a process of its own, and both libraries take turns; reported are medians. What does not fit,
or is not installed, says so in its row. The state of `sft`, `otr` and `dpo` takes 10 bytes a weight here and 16 in
torch, so those of llama3-8b want a larger GPU than one of 80 GB. The results are written after every process, so
what was measured before a run is cut off is there; `--models`, `--tunes` and `--out` split the work.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
import types

import step

from luthier.models.config import ModelConfig
from luthier.models.presets import PRESETS
from luthier.training.metrics import peak_flops, train_flops_per_token

MODELS, TUNES, LIBRARIES = ("qwen3-1.7b", "llama3-8b"), ("sft", "lora", "otr", "dpo", "generate"), ("luthier", "torch")
ROWS = {"qwen3-1.7b": 4, "llama3-8b": 1}  # of a training batch
RESULTS = pathlib.Path(__file__).parent / "results" / "gpu.json"
SETTINGS = ("steps", "time", "remat", "batch", "prompt", "new")
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def shape_of(model: str, tiny: bool) -> dict:
    return {**PRESETS[model], **(TINY if tiny else {})}


def flops_per_token(c: ModelConfig, tune: str, length: int) -> float:
    """Model FLOPs of a trained token, as `time/mfu` counts them; DPO's reference passes forward, a third of them."""
    if tune == "dpo":
        return flops_per_token(c, "sft", length // 2) * 4 / 3
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    maps = 2 * [(c.hidden_size, wide)] + 2 * [(c.hidden_size, narrow)] + 3 * [(c.hidden_size, c.intermediate_size)]
    dense = c.num_layers * sum(i * o for i, o in maps) + c.vocab_size * c.hidden_size
    low = c.num_layers * sum(step.RANK * (i + o) for i, o in maps) if tune == "lora" else 0
    return train_flops_per_token(
        matmul_params=dense + low,
        trained_matmul_params=low or dense,
        num_layers=c.num_layers,
        attention_width=wide,
        sequence_length=length,
    )


def luthier_generate(shape: dict, prompts, new: int):
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from luthier.decoding import Policy, Sampling, generate
    from luthier.models import Transformer
    from luthier.tuners import bind

    bound = bind(Transformer(ModelConfig.from_hf(shape), dtype=jnp.bfloat16, remat="none"))
    narrow = lambda rng: jax.tree.map(lambda x: x.astype(jnp.bfloat16), nn.unbox(bound.init(rng)))  # noqa: E731
    tokenizer = types.SimpleNamespace(eos_ids=(), decode=lambda tokens, **options: "")
    policy = Policy(bound, jax.jit(narrow)(jax.random.key(0)), tokenizer)
    return lambda: generate(policy, prompts.tolist(), Sampling(max_new_tokens=new), batch_size=len(prompts))


def torch_generate(shape: dict, prompts, new: int, device: str):
    import torch

    model = step.torch_model(shape, "bfloat16", device).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, dtype=torch.long, device=device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, **options).cpu()


def measure(workload: str, options: argparse.Namespace) -> dict:
    """Runs one workload in this process."""
    import numpy as np

    library, tune, model = workload.split("/")
    shape, device = shape_of(model, options.tiny), "cpu" if options.tiny else "cuda"
    size = (options.batch, options.prompt) if tune == "generate" else (options.batch or ROWS[model], options.time)
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], size).astype(np.int32)
    begin = time.perf_counter()
    if tune == "generate" and library == "luthier":
        run = luthier_generate(shape, tokens, options.new)
    elif tune == "generate":
        run = torch_generate(shape, tokens, options.new, device)
    elif library == "luthier":
        run = step.luthier_step(tune, tokens, options.remat, shape, "bfloat16")
    else:
        run = step.torch_step(tune, tokens, False, shape, "bfloat16", device, remat=options.remat != "none")
    run(), run()
    ready, seconds = time.perf_counter(), []
    for _ in range(options.steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    kind, peak = memory_of(library)
    count = options.batch * options.new if tune == "generate" else tokens.size
    record = {"device": kind, "peak_gib": peak, "start_seconds": ready - begin, "step_seconds": seconds}
    return {"workload": workload, "tokens_per_second": count / statistics.median(seconds), **record}


def memory_of(library: str) -> tuple[str, float]:
    """The device's name and the most of its memory that was in use; on a CPU that of the process."""
    if library == "luthier":
        import jax

        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        return device.device_kind, stats["peak_bytes_in_use"] / 2**30 if stats else step.peak_gib()
    import torch

    if not torch.cuda.is_available():
        return "cpu", step.peak_gib()
    return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30


def attempt(workload: str, options: argparse.Namespace) -> dict:
    """`measure`, or why it could not be: no memory, no library."""
    try:
        return measure(workload, options)
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        return {"workload": workload, "error": f"{type(error).__name__}: {said[:300]}"}


def row(runs: list[dict], options: argparse.Namespace) -> dict:
    """Medians over the repeats of one workload."""
    failed = [run for run in runs if "error" in run]
    if failed:
        return failed[0]
    middle = {
        key: statistics.median(run[key] for run in runs) for key in ("tokens_per_second", "peak_gib", "start_seconds")
    }
    _, tune, model = runs[0]["workload"].split("/")
    peak = peak_flops(runs[0]["device"])
    if tune != "generate" and peak:
        config = ModelConfig.from_hf(shape_of(model, options.tiny))
        middle["mfu"] = middle["tokens_per_second"] * flops_per_token(config, tune, options.time) / peak
    return {"workload": runs[0]["workload"], "device": runs[0]["device"], "repeats": len(runs), **middle}


def in_process(workload: str, arguments: list[str]) -> dict:
    """`attempt` in a fresh process; a process that is killed says so in its row too."""
    try:
        return step.apart(__file__, workload, arguments, os.cpu_count())
    except SystemExit as error:
        return {"workload": workload, "error": str(error)[-300:]}


def summary(runs: dict[str, list[dict]], options: argparse.Namespace) -> dict[str, dict]:
    return {workload: row(found, options) for workload, found in runs.items() if found}


def write(options: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    settings = {key: getattr(options, key) for key in (*SETTINGS, "repeats", "tiny")}
    record = {**settings, "versions": step.versions(), "summary": list(summary(runs, options).values()), "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def line(one: dict, theirs: dict | None) -> str:
    if "error" in one:
        return f"{one['workload']:32} {one['error']}"
    text = f"{one['workload']:32} {one['tokens_per_second']:10.1f} tokens/s {one['peak_gib']:6.1f} GiB"
    text += f"  MFU {one['mfu']:.1%}" if "mfu" in one else ""
    if theirs and "error" not in theirs:
        text += f"  {one['tokens_per_second'] / theirs['tokens_per_second']:.2f} × torch"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tunes", nargs="+", choices=TUNES, default=list(TUNES))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--repeats", type=int, default=3, help="processes a workload, alternated")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process, after two untimed")
    parser.add_argument("--batch", type=int, default=0, help=f"rows; 0: {ROWS} to train, 16 to generate")
    parser.add_argument("--time", type=int, default=4096, help="tokens a row")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers on a CPU")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.time, options.prompt, options.new = (min(n, 64) for n in (options.time, options.prompt, options.new))
    if options.worker:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        options.batch = options.batch or (16 if "/generate/" in options.worker else 0)
        print(json.dumps(attempt(options.worker, options)))
        return
    is_part = [options.models, options.tunes, options.libraries] != [list(MODELS), list(TUNES), list(LIBRARIES)]
    if (is_part or options.tiny) and options.out == RESULTS:
        parser.error("a part of the work would replace the results of all: give --out")
    arguments = [f"--{key}={getattr(options, key)}" for key in SETTINGS] + ["--tiny"] * options.tiny
    every = [f"{library}/{tune}/{model}" for model in options.models for tune in options.tunes for library in LIBRARIES]
    workloads = [one for one in every if one.partition("/")[0] in options.libraries]
    runs: dict[str, list[dict]] = {workload: [] for workload in workloads}
    for _ in range(options.repeats):
        for workload in workloads:
            if not any("error" in run for run in runs[workload]):
                runs[workload].append(in_process(workload, arguments))
                print(line(runs[workload][-1], None), flush=True)
                write(options, runs)
    table = summary(runs, options)
    print("medians")
    for workload, one in table.items():
        print(line(one, table.get(workload.replace("luthier/", "torch/")) if workload.startswith("luthier") else None))
    print(options.out)


if __name__ == "__main__":
    main()
