"""What a loss costs beside supervised fine-tuning on the same tokens: time and memory of its gradient.

    python benchmarks/losses.py            # SmolLM2-135M's shapes, on this CPU; about 15 minutes on 2 cores
    python benchmarks/losses.py --aot      # the real step compiled for one v5e chip instead; needs luthier[aot]

Every loss has a process of its own for its peak memory (VmHWM, compilation included), and one in which its gradient
of all weights takes turns with that of `sft`, so that a slow spell of the machine hits both: reported are medians of
the ratios of neighbours, in CPU seconds of all threads and in wall seconds. With `--aot`: FLOPs, bytes moved and peak
memory by libtpu's own account, with bfloat16 activations.
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


def memory(name: str) -> dict:
    """The peak memory of a process that makes two gradients."""
    run = gradient(name)
    for number in range(2):
        run(number)  # and nothing holds the last one
    return {"loss": name, "peak_mib": machine.peak_mib()}


def times(name: str, count: int) -> dict:
    """Seconds of `count` gradients after the first, each beside one of `sft`, and the medians of their ratios."""
    runs = {"sft": gradient("sft"), name: gradient(name)}
    for run in runs.values():
        run(0)
    seconds = {kind: {which: [] for which in runs} for kind in ("cpu", "wall")}
    for number in range(1, count + 1):
        for which, run in runs.items():
            start = time.process_time(), time.perf_counter()
            run(number)
            seconds["cpu"][which].append(time.process_time() - start[0])
            seconds["wall"][which].append(time.perf_counter() - start[1])
    ratio = {kind: statistics.median(a / b for a, b in zip(by[name], by["sft"])) for kind, by in seconds.items()}
    return {"loss": name, **ratio, "seconds": seconds}


def gradient(name: str):
    """A function that makes the gradient of all weights, of the given number's random draws, and waits for it."""
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
    return lambda number: jax.block_until_ready(gradients(params, frozen, batch, jnp.int32(number)))


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


def over_sft(runs: list[dict], key: str) -> dict[str, float]:
    plain = next(run[key] for run in runs if run["loss"] == "sft")
    return {run["loss"]: run[key] / plain for run in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed gradients of either, after an untimed one")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="beside `sft`")
    parser.add_argument("--aot", action="store_true", help="compile for a v5e chip instead of running")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--worker", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("memory", "times", "compiled"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arguments = (options.worker, options.steps) if options.what == "times" else (options.worker,)
        print(json.dumps(globals()[options.what](*arguments)))
        return
    names, found = dict.fromkeys(("sft", *options.losses)), {}
    for what in ("compiled",) if options.aot else ("memory", "times"):
        words = [f"--what={what}", f"--steps={options.steps}"]
        found[what] = []
        for name in [one for one in names if what != "times" or one != "sft"]:
            run = steps.apart(__file__, name, words, cores=2)
            found[what].append(run)
            print(" ".join(f"{key}={value:.4g}" for key, value in run.items() if isinstance(value, float)), name)
    if options.aot:
        table = {key: over_sft(found["compiled"], key) for key in ("flops", "bytes", "peak_mib")}
    else:
        table = {"peak_mib": over_sft(found["memory"], "peak_mib")}
        table |= {kind: {run["loss"]: run[kind] for run in found["times"]} for kind in ("cpu", "wall")}
    ratios = {name: {key: row[name] for key, row in table.items() if name in row} for name in names}
    for name, row in ratios.items():
        print(f"{name:25} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    of = machine.facts("jax", "jaxlib", *(["libtpu"] if options.aot else []))
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    known["aot" if options.aot else "cpu"] = {"ratios": ratios, "machine": of, "runs": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
