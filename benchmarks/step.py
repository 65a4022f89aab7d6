"""Time and memory of one training step, beside plain torch/transformers and its `torch.compile`.

    pip install -e '.[parity]' && python benchmarks/step.py

SmolLM2-135M's shapes with random weights, batch 4 × 256 without padding, float32, AdamW, on a few CPU cores. `sft`
trains every weight; `lora` trains rank 16 on all linear maps (PEFT on torch's side); `otr` is `sft` with one-token
rollout of 256 proposals in place of its loss; `dpo` trains every weight on 4 pairs of answers, each half of its 128
tokens, with the reference model's pass in the step (on torch's side with TRL's head). Every measurement is a process
of its own, so its peak memory (VmHWM, compilation included) and caches are its own; workloads alternate, so that a
slow spell of the machine hits all of them. `products` runs luthier's matrix products of that step and nothing else:
what no step of the same arithmetic can beat. Reported are medians over the repeats of each process's median step.
Linux only (/proc).
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

TUNES, LIBRARIES = ("sft", "lora", "otr", "dpo"), ("luthier", "torch", "torch-compile", "products")
WORKLOADS = tuple(
    f"{library}-{tune}" for tune in TUNES for library in LIBRARIES if library != "products" or tune in ("sft", "lora")
)
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
BETA = 0.1  # of DPO
PROPOSALS, TEMPERATURE, OTHERS = 256, 1.3, -0.1  # K, κ and β of one-token rollout
RESULTS = pathlib.Path(__file__).parent / "results" / "step.json"


def luthier_step(tune: str, tokens, remat: str, shape: dict = SMOLLM2_135M, dtype: str = "float32", loss_weights=None):
    """A function that does one step and returns the loss; trained weights are float32, others of `dtype`.

    `loss_weights`, as `tokens`, are those of the next token's loss; None trains all but the last.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from luthier.models import ModelConfig, Transformer
    from luthier.objectives import token_objective
    from luthier.objectives.one_token_rollout import one_token_rollout
    from luthier.objectives.preference.objective import sequence_objective
    from luthier.objectives.preference.pairs import dpo
    from luthier.objectives.sft import sft
    from luthier.optim import optimizers
    from luthier.parallel import make_mesh, make_sharder
    from luthier.training.state import init_state, split
    from luthier.training.step import jit_step, make_step
    from luthier.tuners import bind
    from luthier.tuners.lora import lora

    config = ModelConfig.from_hf(shape)
    sharder = make_sharder(make_mesh(), num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    model = Transformer(config, dtype=jnp.dtype(dtype), remat=remat)
    bound = bind(model, [lora(rank=RANK, alpha=ALPHA)] if tune == "lora" else [])
    trained = "lora" if tune == "lora" else "params"
    kinds = lambda tree: {k: v if k == trained else jax.tree.map(lambda x: x.astype(dtype), v) for k, v in tree.items()}  # noqa: E731
    variables = jax.jit(lambda rng: kinds(nn.unbox(bound.init(rng))))(jax.random.key(0))
    trainable, frozen = split(variables, [trained])
    moment = None if dtype == "float32" else dtype
    optimizer = optimizers.adamw(lambda step: LEARNING_RATE, weight_decay=0.01, first_moment_dtype=moment)
    rollout = one_token_rollout(k=PROPOSALS, temperature=TEMPERATURE, beta=OTHERS)
    objective = token_objective(rollout if tune == "otr" else sft(), sharder)
    if tune == "dpo":
        objective = sequence_objective(dpo(beta=BETA), 2, sharder, reference=bound)
        frozen = {"reference": jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), trainable)}
        tokens = pairs(tokens).reshape(tokens.shape)
    state = init_state(trainable, optimizer, sharder)
    del variables, trainable
    step = jit_step(make_step(bound, objective, optimizer, clip_norm=1.0), state)
    length = tokens.shape[1] // (2 if tune == "dpo" else 1)
    place = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    weights = np.ones(tokens.shape, np.float32) if loss_weights is None else loss_weights.copy()
    weights[place % length == length - 1] = 0
    if tune == "dpo":
        weights[place % length < length // 2 - 1] = 0
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": weights,
        "segment_ids": place // length + 1,
        "positions": place % length,
    }

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return run


def pairs(tokens):
    """Rows `[B, 2L]` as pairs of answers to one prompt, `[B, 2, L]`; the prompt is half of L."""
    made = tokens.reshape(len(tokens), 2, -1).copy()
    prompt = made.shape[2] // 2
    made[:, 1, :prompt] = made[:, 0, :prompt]
    return made


def torch_model(shape: dict, dtype: str, device: str):
    """Random weights in transformers with its default attention."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**shape)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def torch_step(
    tune: str,
    tokens,
    compiled: bool,
    shape: dict = SMOLLM2_135M,
    dtype: str = "float32",
    device: str = "cpu",
    remat: bool = False,
):
    """The same by transformers (and PEFT); other dtypes than float32 by autocast."""
    import torch

    model = torch_model(shape, dtype if tune == "lora" else "float32", device).train()
    model.config.use_cache = False
    if remat:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if tune == "lora":
        import peft

        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"
        )
        model = peft.get_peft_model(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    forward = torch.compile(model) if compiled else model
    ids = torch.tensor(tokens, dtype=torch.long, device=device)

    if tune == "dpo":
        batch_loss = torch_dpo_loss(model, compiled, tokens, dtype, device)
    elif tune == "otr":
        batch_loss = lambda: torch_rollout_loss(forward(input_ids=ids).logits, ids)  # noqa: E731
    else:
        batch_loss = lambda: forward(input_ids=ids, labels=ids).loss  # noqa: E731

    def run() -> float:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = batch_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def torch_rollout_loss(logits, ids):
    """One-token rollout of every token but the first, all logits at once."""
    import torch

    logprobs = logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
    with torch.no_grad():
        proposals = torch.multinomial((logprobs / TEMPERATURE).softmax(-1), PROPOSALS, replacement=True)
        rewards = torch.where(proposals == ids[:, 1:].flatten()[:, None], 1.0, OTHERS)
    return -(rewards * logprobs.gather(1, proposals)).mean()


def torch_dpo_loss(model, compiled: bool, tokens, dtype: str, device: str):
    """A function that gives DPO's loss of the pairs, as TRL's `DPOTrainer` computes it."""
    import copy

    import torch
    from trl.trainer.utils import add_fused_lm_head

    reference = copy.deepcopy(model).eval().requires_grad_(False).to(getattr(torch, dtype))
    for each in (model, reference):
        add_fused_lm_head(each)
    policy, theirs = (torch.compile(model), torch.compile(reference)) if compiled else (model, reference)
    found = pairs(tokens)
    ids = torch.tensor(found.swapaxes(0, 1).reshape(-1, found.shape[2]), dtype=torch.long, device=device)
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    logps = lambda of: of(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum(1)  # noqa: E731

    def run():
        with torch.no_grad():
            before = logps(theirs)
        chosen, rejected = (logps(policy) - before).chunk(2)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    return run


def products_step(tune: str, tokens):
    """The matrix products of luthier's step, each in its shape and as often, by XLA."""
    import jax
    import jax.numpy as jnp

    c, rows = SMOLLM2_135M, tokens.size
    width, layers, vocabulary = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    groups = c["num_attention_heads"] // c["num_key_value_heads"]
    head = width // c["num_attention_heads"]
    narrow = head * c["num_key_value_heads"]
    linear = 2 * [(width, width)] + 2 * [(width, narrow)] + 2 * [(width, c["intermediate_size"])]
    linear += [(c["intermediate_size"], width)]
    dots = []  # (batch, m, k, n), and how often

    def product(n, k, m, times, parts):
        """x W, its derivative in x, and that in W, as far as named."""
        shapes = {"forward": (1, n, k, m), "x": (1, n, m, k), "w": (1, min(k, m), n, max(k, m))}
        dots.extend((shapes[part], times) for part in parts)

    for k, m in linear:
        product(rows, k, m, layers, ("forward", "x", "w") if tune == "sft" else ("forward", "x"))
        if tune == "lora":
            product(rows, k, RANK, layers, ("forward", "x", "w"))
            product(rows, RANK, m, layers, ("forward", "x", "w"))
    chunk = 256  # rows of the fused head at this vocabulary
    parts = ("forward", "x", "w") if tune == "sft" else ("forward", "x")
    product(chunk, width, vocabulary, rows // chunk, parts)
    batch, length = tokens.shape
    per_head = (batch * c["num_key_value_heads"], groups * length)
    dots.append(((*per_head, head, length), 3 * layers))  # q k twice, do v
    dots.append(((*per_head, length, head), 2 * layers))  # p v, dp k
    dots.append(((per_head[0], head, per_head[1], length), 2 * layers))  # q dp, do p
    multiply = jax.jit(lambda old, a, b: a @ b, donate_argnums=0, keep_unused=True)
    operands = [(jnp.ones((b, m, k)), jnp.ones((b, k, n)), times) for (b, m, k, n), times in dots]

    def run() -> float:
        for a, b, times in operands:
            out = jnp.zeros((a.shape[0], a.shape[1], b.shape[2]))
            for _ in range(times):
                out = multiply(out, a, b)
            out.block_until_ready()
        return 0.0

    return run


def measure(workload: str, options: argparse.Namespace) -> dict:
    """Runs one workload in this process."""
    import numpy as np

    shape = (options.batch, options.time)
    tokens = np.random.default_rng(0).integers(0, SMOLLM2_135M["vocab_size"], shape).astype(np.int32)
    library, _, tune = workload.rpartition("-")
    begin = time.perf_counter()
    if library == "luthier":
        run = luthier_step(tune, tokens, options.remat)
    elif library == "products":
        run = products_step(tune, tokens)
    else:
        run = torch_step(tune, tokens, compiled=library == "torch-compile")
    return {"workload": workload, **timed(run, options.steps, tokens.size, begin)}


def timed(run, steps: int, tokens: int, begin: float) -> dict:
    """Times of so many steps of so many tokens after two untimed ones, and the peak memory of this process.

    `begin` is when the work began, by `time.perf_counter`.
    """
    losses = [run(), run()]  # the second warms caches and allocators
    ready, seconds = time.perf_counter(), []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(run())
        seconds.append(time.perf_counter() - start)
    return {
        "step_seconds": seconds,
        "tokens_per_second": tokens / statistics.median(seconds),
        "peak_gib": peak_gib(),
        "start_seconds": ready - begin,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def measure_apart(workload: str, options: argparse.Namespace) -> dict:
    """`measure` in a fresh process on `--cores` cores."""
    arguments = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "time", "remat")]
    return apart(__file__, workload, arguments, options.cores)


def apart(script: str, workload: str, arguments: list[str], cores: int, python: str = sys.executable) -> dict:
    """The last line that `script --worker=WORKLOAD` prints, in a fresh process on so many cores."""
    mine = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        [python, script, f"--worker={workload}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(len(mine)), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, mine),
    )
    if done.returncode:
        sys.exit(f"{workload} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_gib() -> float:
    """The most memory that this process ever held."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def summary(runs: list[dict]) -> dict:
    """Medians over the repeats of each workload, with the extremes of the speed."""
    table = {}
    for workload in dict.fromkeys(run["workload"] for run in runs):
        mine = [run for run in runs if run["workload"] == workload]
        speeds = [run["tokens_per_second"] for run in mine]
        table[workload] = {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "peak_gib": statistics.median(run["peak_gib"] for run in mine),
            "start_seconds": statistics.median(run["start_seconds"] for run in mine),
            "repeats": len(mine),
        }
    return table


def show(table: dict) -> None:
    print(f"{'':20} {'tokens/s':>9} {'range':>13} {'peak GiB':>9} {'start s':>8} {'speed/torch':>12} {'memory':>7}")
    for workload, row in table.items():
        plain = table.get(f"torch-{workload.rpartition('-')[2]}")
        ratios = ("", "")
        if plain:
            ratios = (
                f"{row['tokens_per_second'] / plain['tokens_per_second']:.2f}",
                f"{row['peak_gib'] / plain['peak_gib']:.2f}",
            )
        span = f"{row['slowest']:.0f}–{row['fastest']:.0f}"
        print(
            f"{workload:20} {row['tokens_per_second']:9.1f} {span:>13} {row['peak_gib']:9.2f} "
            f"{row['start_seconds']:8.1f} {ratios[0]:>12} {ratios[1]:>7}"
        )


def versions() -> dict:
    """Of Python and of the libraries that are installed."""
    from importlib import metadata

    names = ("luthier", "jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")
    installed = {found.name for found in metadata.distributions()}
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names if n in installed}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes a workload, alternated")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process, after two untimed")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--time", type=int, default=256, help="tokens a row")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots", help="of luthier's layers")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options)))
        return
    if set(options.workloads) != set(WORKLOADS) and options.out == RESULTS:
        parser.error("some of the workloads would replace the results of all: give --out")
    runs = []
    for repeat in range(options.repeats):
        for workload in options.workloads:
            runs.append(measure_apart(workload, options))
            speed, peak = runs[-1]["tokens_per_second"], runs[-1]["peak_gib"]
            print(f"{repeat + 1}/{options.repeats} {workload:20} {speed:8.1f} tokens/s {peak:6.2f} GiB", flush=True)
    table = summary(runs)
    show(table)
    settings = {key: getattr(options, key) for key in ("repeats", "steps", "batch", "time", "cores", "remat")}
    machine = {"cpu": cpu(), "versions": versions()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**settings, **machine, "summary": table, "runs": runs}, indent=1) + "\n")
    print(options.out)


def cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
