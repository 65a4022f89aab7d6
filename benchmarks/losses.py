"""What a loss costs beside supervised fine-tuning on the same tokens: time and memory of its gradient.

    python benchmarks/losses.py            # SmolLM2-135M's shapes, on this CPU; about 10 minutes on 2 cores
    python benchmarks/losses.py --aot      # the real step compiled for one v5e chip instead; needs luthier[aot]

Every loss has a process of its own for its peak memory (VmHWM, compilation included); processes alternate. Times
are CPU seconds of all threads and wall seconds of one gradient of all weights, medians over steps and repeats; ratios
are to `sft` of the same repeat. With `--aot`: FLOPs, bytes moved and peak memory by libtpu's own account, with
bfloat16 activations.
"""

import argparse
import json
import pathlib
import statistics
import time

import machine
import step as steps

LOSSES = {
    "sft": ("sft", {}),
    "dft": ("dft", {}),
    "one_token_rollout": ("one_token_rollout", {"k": 256}),
    "one_token_rollout-exact": ("one_token_rollout", {"mode": "exact"}),
    "asft": ("asft", {}),
    "dpo": ("dpo", {}),
    "dpo-cached": ("dpo", {}),  # the reference's log-probabilities come with the batch
    "orpo": ("orpo", {}),
}
BATCH, TIME, ANSWERS = 4, 256, 2
RESULTS = pathlib.Path(__file__).parent / "results" / "losses.json"


def measure(name: str, count: int) -> dict:
    """CPU and wall seconds of each of `count` gradients after the first, and the peak memory."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from luthier.config import resolve, spec
    from luthier.models import ModelConfig, Transformer
    from luthier.objectives import TokenLoss, token_objective
    from luthier.objectives.preference.objective import sequence_objective
    from luthier.parallel import make_mesh, make_sharder
    from luthier.training.step import make_gradients
    from luthier.tuners import bind

    config = ModelConfig.from_hf(steps.SMOLLM2_135M)
    sharder = make_sharder(make_mesh(), num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    bound = bind(Transformer(config))
    params = jax.jit(lambda rng: nn.unbox(bound.init(rng)))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (BATCH, TIME), np.int32)
    length = TIME // ANSWERS
    row = np.arange(TIME, dtype=np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.tile((row % length < length - 1).astype(np.float32), (BATCH, 1)),
        "segment_ids": np.tile(row // length + 1, (BATCH, 1)),
        "positions": np.tile(row % length, (BATCH, 1)),
    }
    loss, options = LOSSES[name]
    loss = resolve(spec(loss, **options))()
    if isinstance(loss, TokenLoss):
        compared = bound if loss.reference else None
        objective = token_objective(loss, sharder, reference=compared)
    else:
        compared = bound if loss.needs_reference and not name.endswith("-cached") else None
        batch["reference_logps"] = np.full((BATCH, TIME), -9.0, np.float32)
        objective = sequence_objective(loss, ANSWERS, sharder, reference=compared)
    frozen = {"reference": params} if compared else {}
    gradients = jax.jit(make_gradients(bound, objective))
    times = []
    for number in range(count + 1):
        start = time.process_time(), time.perf_counter()
        jax.block_until_ready(gradients(params, frozen, batch, jnp.int32(number)))
        times.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cpu, wall = (statistics.median(t[i] for t in times[1:]) for i in (0, 1))
    return {"loss": name, "cpu_seconds": cpu, "wall_seconds": wall, "peak_mib": machine.peak_mib()}


def compiled(name: str) -> dict:
    """What libtpu says of the step of configs/one_token_rollout.py on one chip, all weights trained."""
    import jax.numpy as jnp

    from luthier import config
    from luthier.models import ModelConfig
    from luthier.training import aot
    from luthier.training.run import config_sharder

    root = pathlib.Path(__file__).parent.parent
    changes = ["model.compute_dtype=bfloat16", "stages[0].tuners=()", f"stages[0].batch_size={BATCH}"]
    recipe = config.load(f"{root}/configs/one_token_rollout.py:sft", [*changes, f"stages[0].sequence_length={TIME}"])
    loss, options = LOSSES[name]
    with recipe.stages[0].unlocked():
        recipe.stages[0].objective = config.spec(loss, **options)
        recipe.stages[0].cache_reference = name.endswith("-cached")
    shape = ModelConfig.from_hf(steps.SMOLLM2_135M)
    sharder = config_sharder(recipe, shape, aot.describe("v5e:1x1").devices)
    step, arguments, _ = aot.abstract_step(recipe, recipe.stages[0], shape, sharder, jnp.float32)
    program = step.lower(*arguments).compile()
    cost = program.cost_analysis()
    peak = program.memory_analysis().peak_memory_in_bytes
    return {"loss": name, "flops": cost["flops"], "bytes": cost["bytes accessed"], "peak_mib": peak / 2**20}


def ratios(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Medians over the repeats of each figure's ratio to `sft` of the same repeat."""
    table = {}
    for name in dict.fromkeys(run["loss"] for run in runs):
        mine = [(run, next(r for r in runs if r["loss"] == "sft" and r["repeat"] == run["repeat"])) for run in runs]
        mine = [(run, plain) for run, plain in mine if run["loss"] == name]
        keys = [key for key in mine[0][0] if key not in ("loss", "repeat")]
        table[name] = {key: statistics.median(run[key] / plain[key] for run, plain in mine) for key in keys}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes a loss, alternated")
    parser.add_argument("--steps", type=int, default=4, help="timed gradients a process, after one untimed")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="beside `sft`")
    parser.add_argument("--aot", action="store_true", help="compile for a v5e chip instead of running")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--worker", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(compiled(options.worker) if options.aot else measure(options.worker, options.steps)))
        return
    runs, words = [], [f"--steps={options.steps}", *(["--aot"] if options.aot else [])]
    for repeat in range(1 if options.aot else options.repeats):
        for name in dict.fromkeys(("sft", *options.losses)):
            found = steps.apart(__file__, name, words, cores=2)
            runs.append({**found, "repeat": repeat})
            print(
                " ".join(
                    f"{key}={value:.4g}" if isinstance(value, float) else str(value) for key, value in found.items()
                )
            )
    table = ratios(runs)
    for name, row in table.items():
        print(f"{name:25} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    of = machine.facts("jax", "jaxlib", *(["libtpu"] if options.aot else []))
    known["aot" if options.aot else "cpu"] = {"ratios": table, "machine": of, "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
