"""Time and memory of one SFT step beside other JAX libraries, each in a virtual environment of its own.

    python benchmarks/peers.py --environments=DIR

A Llama shape of 4 layers, width 256, MLP 1024, 4 heads and 8192 tokens, untied; batch 8 × 128, where the first half
of each row is a prompt without loss; float32, AdamW, the gradient clipped to norm 1. A peer runs its own training
step with its own loss, remat as it comes or (`-no-remat`) switched off; `plain` is the step as one writes it by hand
in JAX. Environments that are missing are made in DIR from the lines of `PEERS`; `luthier` and `plain` run in the one
that runs this file. A peer that cannot be installed is listed with its reason. Every measurement is a process of its
own; workloads alternate; reported are medians over the rounds of each process's median step. Linux only (/proc).
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import step

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
BATCH, TIME, PROMPT = 8, 128, 64
VOCABULARY, WIDTH, MLP = LLAMA["vocab_size"], LLAMA["hidden_size"], LLAMA["intermediate_size"]
LAYERS, HEADS = LLAMA["num_hidden_layers"], LLAMA["num_attention_heads"]
PARAMETERS = 2 * VOCABULARY * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * WIDTH) + WIDTH
LEARNING_RATE, WEIGHT_DECAY, CLIP, STEPS = step.LEARNING_RATE, 0.01, 1.0, 1000
RESULTS = step.RESULTS.with_name("peers.json")


@dataclasses.dataclass(frozen=True)
class Peer:
    """How to make an environment.

    Attributes:
      python: the command that it is made with.
      requirements: lines for pip.
      packages: those whose versions are reported.
    """

    python: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]


MARIN = ("levanter", "haliax", "iris", "fray", "rigging", "zephyr", "finestore")

PEERS = {
    "levanter": Peer(
        "python3.12",
        (
            *(f"marin-{name}==0.2.227.dev40316220070" for name in MARIN),
            "marin-finelog==0.2.71.dev40003900277",
            "marin-iris-native==0.1.15.dev39984932175",
            "jax==0.11.2",
        ),
        ("marin-levanter", "marin-haliax", "jax", "jaxlib", "equinox", "optax"),
    ),
    "tunix": Peer(
        "python3.12",
        ("google-tunix==0.1.7", "jax==0.12.0.1", "flax==0.12.12", "optax==0.2.8"),
        ("google-tunix", "jax", "jaxlib", "flax", "optax"),
    ),
    # The package's own lists of dependencies are for CUDA and TPUs; these serve the training step on a CPU.
    "maxtext": Peer(
        "python3.12",
        (
            *("maxtext==0.2.5", "jax==0.11.2", "jaxlib==0.11.2", "flax==0.12.12", "optax", "orbax-checkpoint"),
            *("qwix", "aqtp", "tokamax", "pydantic", "etils[epath]", "grain", "tokenizers", "absl-py", "pyyaml"),
            *("cloud-accelerator-diagnostics", "psutil", "pathwaysutils", "omegaconf", "huggingface-hub", "sympy"),
            *("requests", "jinja2", "tensorflow-cpu", "tensorflow-datasets", "tensorboardx", "sentencepiece"),
            *("transformers", "datasets", "chex", "google-cloud-storage", "ml-goodput-measurement", "gcsfs"),
            *("google-cloud-mldiagnostics", "tiktoken", "drjax", "pillow", "ml-collections"),
        ),
        ("maxtext", "jax", "jaxlib", "flax", "optax"),
    ),
}
WORKLOADS = ("luthier", "levanter", "levanter-no-remat", "tunix", "maxtext", "maxtext-no-remat", "plain")


def luthier(tokens, weights, remat: bool):
    return step.luthier_step("sft", tokens, "dots" if remat else "none", LLAMA, loss_weights=weights)


def levanter(tokens, weights, remat: bool):
    """`Trainer.train_step` on the model's own next-token loss."""
    import haliax
    import jax
    from levanter.layers.attention import AttentionMask
    from levanter.models.llama import LlamaConfig
    from levanter.models.lm_model import LmExample
    from levanter.optim.config import AdamConfig
    from levanter.tracker.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    config = LlamaConfig(
        max_seq_len=TIME,
        hidden_dim=WIDTH,
        intermediate_dim=MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        gradient_checkpointing=remat,
    )
    settings = TrainerConfig(
        id="peer", tracker=NoopConfig(), require_accelerator=False, train_batch_size=BATCH, num_train_steps=STEPS,
        log_jaxprs=False, log_xla_hlo=False,
    )  # fmt: skip
    optimizer = AdamConfig(
        learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta2=0.999, max_grad_norm=CLIP, warmup=0,
        lr_schedule="constant",
    ).build(STEPS)  # fmt: skip

    def loss(model, example, *, key=None):
        return model.compute_next_token_loss(example, key=key)

    trainer = Trainer(settings, optimizer, loss, add_default_hooks=False)
    trainer.__enter__()  # the mesh, for as long as this process lives
    vocabulary, key = haliax.Axis("vocab", VOCABULARY), jax.random.key(0)
    state = trainer.initial_state(key, model_init=lambda: config.build(vocabulary, key=key))
    named = lambda x: haliax.named(jax.numpy.asarray(x), ("batch", "position"))  # noqa: E731
    example = LmExample(named(tokens), named(weights), AttentionMask.causal())
    check(state.model, state.opt_state)

    def run() -> float:
        nonlocal state
        info = trainer.train_step(state, example)
        state = info.state
        return info.loss

    return run


def tunix(tokens, weights, remat: bool):
    """The step that `PeftTrainer.train` runs for each batch, on the trainer's own loss."""
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
    from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

    config = ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=HEADS,
        rope_theta=int(LLAMA["rope_theta"]),
        norm_eps=LLAMA["rms_norm_eps"],
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), adamw)
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=STEPS, max_steps=STEPS))
    check(nnx.state(model, nnx.Param), nnx.state(trainer.optimizer, nnx.optimizer.OptState))
    everywhere = jnp.ones(tokens.shape, bool)
    batch = {
        "input_tokens": jnp.asarray(tokens),
        "input_mask": jnp.roll(jnp.asarray(weights), 1, axis=1),  # of the token itself, not of the one before it
        "positions": build_positions_from_mask(everywhere),
        "attention_mask": make_causal_attn_mask(everywhere),
    }
    update, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as `train` does
    return lambda: float(update(batch)[0])


def maxtext(tokens, weights, remat: bool):
    """The jitted `train_step` of `maxtext.trainers.pre_train.train`, set up as its `train_loop` does."""
    import jax
    import numpy as np
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext import configs
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    options = {
        "run_name": "peer",
        "base_output_directory": tempfile.mkdtemp(),
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "dataset_type": "synthetic",
        "steps": STEPS,
        "per_device_batch_size": BATCH,
        "max_target_length": TIME,
        "decoder_block": "llama2",
        "base_emb_dim": WIDTH,
        "base_mlp_dim": MLP,
        "base_num_decoder_layers": LAYERS,
        "base_num_query_heads": HEADS,
        "base_num_kv_heads": HEADS,
        "head_dim": WIDTH // HEADS,
        "vocab_size": VOCABULARY,
        "attention": "dot_product",  # the other kernels are those of accelerators
        "dtype": "float32",
        "learning_rate": LEARNING_RATE,
        "warmup_steps_fraction": 0.0,
        "learning_rate_final_fraction": 1.0,
        "adam_b2": 0.999,
        "adam_weight_decay": WEIGHT_DECAY,
        "gradient_clipping_threshold": CLIP,
    }
    if not remat:
        options["remat_policy"] = "none"
    base = pathlib.Path(configs.__file__).with_name("base.yml")
    config, recorder = train.initialize(["peers", str(base), *(f"{key}={value}" for key, value in options.items())])
    _, _, shardings, _, mesh, *_, state = train_utils.setup_train_loop(config, recorder)
    graph, state = nnx.split(state)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    update, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, None, of_params
    )
    check(nnx.filter_state(state.model, nnx.Param), state.optimizer)
    positions = np.tile(np.arange(TIME, dtype=np.int32), (BATCH, 1))
    batch = {
        "inputs": tokens,
        "inputs_position": positions,
        "inputs_segmentation": np.ones_like(tokens),
        "targets": np.roll(tokens, -1, axis=1),
        "targets_position": positions,
        "targets_segmentation": weights.astype(np.int32),
    }
    batch = jax.device_put(batch, sharding.get_input_data_sharding(config, mesh))

    def run() -> float:
        nonlocal state
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = update(state, batch)
        return float(metrics["scalar"]["learning/loss"])

    return run


def plain(tokens, weights, remat: bool):
    """Layers one after the other, all logits at once, optax's AdamW, nothing else."""
    import jax
    import jax.numpy as jnp
    import optax

    size = WIDTH // HEADS
    shapes = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {"gate": (WIDTH, MLP), "up": (WIDTH, MLP), "down": (MLP, WIDTH)}
    keys = iter(jax.random.split(jax.random.key(0), 2 + len(shapes) * LAYERS))
    draw = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)  # noqa: E731
    norms = lambda: {"before": jnp.ones(WIDTH), "between": jnp.ones(WIDTH)}  # noqa: E731
    params = {
        "embedding": draw(VOCABULARY, WIDTH),
        "layers": [{name: draw(*shape) for name, shape in shapes.items()} | norms() for _ in range(LAYERS)],
        "norm": jnp.ones(WIDTH),
        "head": draw(WIDTH, VOCABULARY),
    }
    angles = jnp.arange(TIME)[:, None] / LLAMA["rope_theta"] ** (jnp.arange(0, size, 2) / size)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    causal = jnp.tril(jnp.ones((TIME, TIME), bool))

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + LLAMA["rms_norm_eps"]) * scale

    def rotate(x):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def layer(x, p):
        h = norm(x, p["before"])
        q, k, v = ((h @ p[name]).reshape(BATCH, TIME, HEADS, size) for name in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", rotate(q), rotate(k)) / size**0.5
        shares = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        x += jnp.einsum("bhts,bshd->bthd", shares, v).reshape(BATCH, TIME, WIDTH) @ p["o"]
        h = norm(x, p["between"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def loss(params, tokens, weights):
        x = params["embedding"][tokens]
        for p in params["layers"]:
            x = layer(x, p)
        logits = norm(x, params["norm"]) @ params["head"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(weights[:, :-1] * losses) / jnp.sum(weights[:, :-1])

    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), adamw)
    moments = optimizer.init(params)
    check(params, moments)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, moments, tokens, weights):
        value, grads = jax.value_and_grad(loss)(params, tokens, weights)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    def run() -> float:
        nonlocal params, moments
        params, moments, value = update(params, moments, tokens, weights)
        return float(value)

    return run


def check(params, moments) -> None:
    """All train the same number of weights, in float32, with moments in float32."""
    import jax

    leaves = jax.tree.leaves(params)
    kinds = {str(x.dtype) for x in [*leaves, *(x for x in jax.tree.leaves(moments) if getattr(x, "size", 1) > 1)]}
    found = sum(x.size for x in leaves)
    if found != PARAMETERS or kinds != {"float32"}:
        sys.exit(f"{found} weights and moments of {kinds}, not {PARAMETERS} of float32")


def measure(workload: str, steps: int) -> dict:
    """Runs one workload in this process."""
    import numpy as np

    name = library(workload)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, TIME)).astype(np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, PROMPT - 1 : -1] = 1
    begin = time.perf_counter()
    run = globals()[name](tokens, weights, remat=name == workload)
    return {"workload": workload, **step.timed(run, steps, tokens.size, begin)}


def make(name: str, directory: pathlib.Path) -> str:
    """Makes an environment, unless it was made of the same lines; the reason if that fails."""
    peer, python, made = PEERS[name], directory / "bin" / "python", directory / "made_of.txt"
    lines = "\n".join(peer.requirements) + "\n"
    if made.exists() and made.read_text() == lines:
        return ""
    known = shutil.which(peer.python)
    if known is None:
        return f"needs {peer.python}"
    print(f"{name}: making {directory}", flush=True)
    for command in ([known, "-m", "venv", directory], [python, "-m", "pip", "install", "-q", *peer.requirements]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return (errors or done.stderr.splitlines() or ["no reason given"])[-1]
    made.write_text(lines)
    return ""


def versions(python: str, packages) -> dict:
    code = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def prepare(workloads: list[str], directory: pathlib.Path) -> tuple[dict, dict, dict]:
    """The Python of each library, the versions there, and the reason of each that is missing."""
    pythons = {"luthier": sys.executable, "plain": sys.executable}
    used, missing = {"luthier": versions(sys.executable, ("luthier", "jax", "jaxlib", "flax", "optax"))}, {}
    for name in PEERS:
        if any(library(workload) == name for workload in workloads):
            pythons[name] = str((directory / name / "bin" / "python").absolute())
            reason = make(name, directory / name)
            if reason:
                missing[name] = reason
                print(f"{name} is left out: {reason}", flush=True)
            else:
                used[name] = versions(pythons[name], PEERS[name].packages)
    return pythons, used, missing


def run_all(options: argparse.Namespace, pythons: dict, missing: dict) -> list[dict]:
    """Every workload once a round; a peer's that fails is added to `missing`."""
    runs = []
    for repeat in range(options.repeats):
        for workload in options.workloads:
            name = library(workload)
            if name in missing or workload in missing:
                continue
            try:
                run = step.apart(__file__, workload, [f"--steps={options.steps}"], options.cores, pythons[name])
            except SystemExit as failure:
                if name not in PEERS:
                    raise
                missing[workload] = str(failure)[-500:]
                print(f"{workload} is left out: {failure}", flush=True)
                continue
            runs.append({**run, "repeat": repeat})
            took = f"{median(run):6.0f} ms {run['peak_gib']:5.2f} GiB"
            print(f"{repeat + 1}/{options.repeats} {workload:18} {took}", flush=True)
    return runs


def library(workload: str) -> str:
    return workload.removesuffix("-no-remat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=pathlib.Path, default="peers", help="where they are, or are to be made")
    parser.add_argument("--repeats", type=int, default=5, help="processes a workload, alternated")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a process, after two untimed")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.steps)), flush=True)
        os._exit(0)  # before what the libraries print at their end
    if set(options.workloads) != set(WORKLOADS) and options.out == RESULTS:
        parser.error("some of the workloads would replace the results of all: give --out")
    pythons, used, missing = prepare(options.workloads, options.environments)
    runs = run_all(options, pythons, missing)
    table = summary(runs)
    show(table)
    settings = {key: getattr(options, key) for key in ("repeats", "steps", "cores")}
    shape = {**LLAMA, "batch": BATCH, "time": TIME, "prompt": PROMPT, "parameters": PARAMETERS}
    record = {**settings, "shape": shape, "cpu": step.cpu(), "versions": used, "missing": missing}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**record, "summary": table, "runs": runs}, indent=1) + "\n")
    print(options.out)


def median(run: dict) -> float:
    """Milliseconds of a step."""
    return 1e3 * statistics.median(run["step_seconds"])


def summary(runs: list[dict]) -> dict:
    """Medians over the rounds; `luthier_over_it` is the median of luthier's time over the peer's in the same round."""
    table = {}
    ours = {run["repeat"]: median(run) for run in runs if run["workload"] == "luthier"}
    for workload in dict.fromkeys(run["workload"] for run in runs):
        mine = [run for run in runs if run["workload"] == workload]
        times = [median(run) for run in mine]
        ratios = [ours[run["repeat"]] / median(run) for run in mine if run["repeat"] in ours]
        table[workload] = {
            "milliseconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "luthier_over_it": statistics.median(ratios) if ratios else None,
            "peak_gib": statistics.median(run["peak_gib"] for run in mine),
            "start_seconds": statistics.median(run["start_seconds"] for run in mine),
            "first_loss": mine[0]["first_loss"],
            "last_loss": mine[0]["last_loss"],
        }
    return table


def show(table: dict) -> None:
    print(f"{'':18} {'ms a step':>9} {'range':>11} {'ours/it':>8} {'peak GiB':>9} {'start s':>8} {'loss':>15}")
    for workload, row in table.items():
        span = f"{row['fastest']:.0f}–{row['slowest']:.0f}"
        ratio = "" if row["luthier_over_it"] is None else f"{row['luthier_over_it']:.2f}"
        print(
            f"{workload:18} {row['milliseconds']:9.0f} {span:>11} {ratio:>8} {row['peak_gib']:9.2f} "
            f"{row['start_seconds']:8.1f} {row['first_loss']:7.3f} {row['last_loss']:7.3f}"
        )


if __name__ == "__main__":
    main()
