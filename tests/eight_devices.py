"""Checks that need 8 simulated devices; `python eight_devices.py NAME…` runs some of them in a process of its own."""

import dataclasses
import itertools
import math
import os
import pathlib
import re
import sys
import tempfile

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny_policy
from jax.sharding import PartitionSpec as P

from luthier import config as configs
from luthier.models import Transformer
from luthier.models.attention import attend, make_mask
from luthier.models.matmul import lookup, matmul
from luthier.objectives import reward, reward_objective, token_objective
from luthier.objectives.preference import combine, ranked, unpaired
from luthier.objectives.preference.objective import sequence_objective
from luthier.objectives.sft import sft
from luthier.parallel import make_mesh, make_sharder, reduce_scatter
from luthier.training.aot import abstract_step
from luthier.training.checkpoints import Checkpoints
from luthier.training.flops import matmul_flops
from luthier.training.hlo import collectives
from luthier.training.state import split
from luthier.training.step import make_gradients
from luthier.tuners import Bound, bind
from luthier.tuners.adapter import adapter
from luthier.tuners.ia3 import ia3
from luthier.tuners.lofit import lofit
from luthier.tuners.lora import lora
from luthier.tuners.prefix import prefix
from luthier.tuners.reward_head import reward_head

MESHES = [(8, 1, 1, 1), (1, 1, 1, 8), (1, 8, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (1, 2, 2, 2), (2, 4, 1, 1)]
AXES = [("embed", "heads"), ("heads", "embed"), ("embed", "mlp"), ("mlp", "embed"), ("embed", None), (None, "embed")]
AXES += [(("mlp", "embed"), None), (None, ("heads", "embed"))]


def sharder(sizes):
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor", "sequence"), sizes)))
    return make_sharder(mesh, num_heads=8, num_kv_heads=4)


def close(got, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def products():
    """matmul and lookup, values and gradients, equal the plain product on every mesh and for every kind of weight."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((8, 16, 32)), rng.standard_normal((8, 16, 64))
    w, table = rng.standard_normal((32, 64)), rng.standard_normal((48, 32))
    x, g, w, table = (jnp.asarray(a, jnp.float32) for a in (x, g, w, table))
    tokens = jnp.asarray(rng.integers(0, 48, (8, 16)))
    expected = jax.vjp(lambda x, w: x @ w, x, w)[1](g)
    expected_table = jax.vjp(lambda table: table[tokens], table)[1](x)
    for sizes in MESHES:
        s = sharder(sizes)
        for axes in AXES:

            def run(x, w, g, s=s, axes=axes):
                w = jax.lax.with_sharding_constraint(w, s.sharding(axes, w.shape))
                y, pull = jax.vjp(lambda x, w: matmul(x, w, s, axes), x, w)
                return y, pull(g)

            close(jax.jit(run)(x, w, g), (x @ w, expected))

        def look(table, x, s=s):
            y, pull = jax.vjp(lambda table: lookup(table, tokens, jnp.float32, s), table)
            return y, pull(x)

        close(jax.jit(look)(table, x), (table[tokens], expected_table))
    odd = jnp.ones((3, 5, 32))  # rows that do not divide
    close(jax.jit(lambda x: matmul(x, w, sharder((2, 2, 2, 1)), ("embed", "mlp")))(odd), odd @ w)


def scatters():
    """A sum in stages along the lines of a torus, tile by tile, gives each device the part that one stage gives it."""
    mesh = make_mesh(data=1, fsdp=8)
    lines, shapes = [(8,), (2, 4), (4, 2), (2, 2, 2)], [(128, 256), (1024, 8), (8, 1024)]
    for sizes, in_tiles, shape in itertools.product(lines, [False, True], shapes):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((8, *shape)), jnp.float32)
        for dimension, spec in [(0, P("fsdp")), (1, P(None, "fsdp"))]:

            def run(x, sizes=sizes, in_tiles=in_tiles, dimension=dimension):
                return reduce_scatter(x[0], "fsdp", dimension, sizes, in_tiles=in_tiles)

            total = jax.shard_map(run, mesh=mesh, in_specs=P("fsdp"), out_specs=spec, check_vma=False)(x)
            close(total, x.sum(0))


def messages():
    """A fully sharded product gathers its weight for each pass, and scatters one float32 gradient."""
    s = sharder((1, 8, 1, 1))
    x = jax.ShapeDtypeStruct((8, 16, 256), jnp.bfloat16, sharding=s.batch())
    w = jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=s.sharding(("embed", "mlp"), (256, 512)))

    def run(x, w):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, s, ("embed", "mlp")), x, w)
        return pull(y)

    traced = jax.jit(run).trace(x, w)
    found = {one.kind: one for one in collectives(traced.lower().compile().as_text(), s.mesh.shape)}
    assert set(found) == {"all-gather", "reduce-scatter"}, found
    numbers = 256 * 512
    width = found["all-gather"].output_bytes // numbers // found["all-gather"].calls
    assert width in (2, 4)  # XLA gathers bfloat16 as float32 on a CPU
    assert found["all-gather"].calls in (1, 2) and found["all-gather"].axes == "fsdp"
    assert found["reduce-scatter"].output_bytes == 4 * numbers // 8
    assert found["reduce-scatter"].wire_bytes == 4 * numbers * 7 // 8
    assert matmul_flops(traced.jaxpr) == 3 * 2 * 8 * 16 * 256 * 512


def splash():
    """Splash attention, interpreted, on meshes that split rows, heads and time."""
    rng = np.random.default_rng(0)
    shape = lambda heads: (4, 512, heads, 64)  # noqa: E731
    q, k, v, g = (jnp.asarray(rng.standard_normal(shape(h)), jnp.float32) for h in (8, 4, 4, 8))
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [130, 260, 100, 22]))[None].repeat(4, 0)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in (130, 260, 100, 22)]))[None].repeat(4, 0)
    fields = {"segment_ids": segments, "positions": positions}
    mask = make_mask(fields, fields, 128, plain=True)
    real = (segments > 0)[..., None, None]

    def run(backend, is_local, softcap, s, q, k, v):
        f = lambda q, k, v: attend(backend, q / 8, k, v, mask, jnp.bool_(is_local), softcap, s) * real  # noqa: E731
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(g * real)

    for sizes, is_local, softcap in [
        ((2, 2, 2, 1), False, None),
        ((1, 2, 2, 2), True, 30.0),
    ]:
        s = sharder(sizes)
        expected = jax.jit(run, static_argnums=(0, 1, 2, 3))("xla", is_local, softcap, s, q, k, v)
        close(jax.jit(run, static_argnums=(0, 1, 2, 3))("splash", is_local, softcap, s, q, k, v), expected, 2e-4)


def steps():
    """The real step of packed rows gives the same loss on every mesh, and nothing large lies whole on a device: neither
    what goes in and comes out, by the compiled program's shardings, nor any array with all rows and all time on the
    way."""
    for method in ("full", "lora"):
        _steps(method)


def _steps(method):
    batch, length = 24, 80
    few = ["model.compute_dtype=float32", f"stages[0].batch_size={batch}", f"stages[0].sequence_length={length}"]
    recipe = configs.load(f"configs/pod.py:{method}", few)
    shape = tiny_policy.config(hidden_size=64, intermediate_size=160, num_attention_heads=8, num_key_value_heads=4)
    losses = {}
    for sizes in [(8, 1, 1, 1), (1, 2, 1, 4), (1, 2, 2, 2)]:
        s = sharder(sizes)
        step, arguments, _ = abstract_step(recipe, recipe.stages[0], shape, s, "float32")
        compiled = step.lower(*arguments).compile()
        (state_in, frozen_in, _), _ = compiled.input_shardings
        parts = s.size("fsdp") * s.size("sequence")
        state, frozen, _ = arguments
        for of, found in [(state, state_in), (state, compiled.output_shardings[0]), (frozen, frozen_in)]:
            for leaf, where in zip(jax.tree.leaves(of), jax.tree.leaves(found), strict=True):
                if leaf.size > 1000:
                    assert math.prod(where.shard_shape(leaf.shape)) <= leaf.size // parts, (sizes, leaf, where)
        widths = re.findall(rf"f32\[{batch},{length},(\d+)", compiled.as_text())
        assert all(int(width) < shape.hidden_size for width in widths), (sizes, set(widths))
        losses[sizes] = np.array([float(one["loss"]) for one in _run(compiled, *arguments)])
    for found in losses.values():
        np.testing.assert_allclose(found, losses[8, 1, 1, 1], rtol=1e-5)


def tuners():
    """One tuner at each kind of site, all at once: loss and gradients on a mesh are those of one device."""
    shape = tiny_policy.config(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4)
    parts = (
        ia3(),
        lora(rank=2, alpha=4.0, dora=True, init="pissa"),
        adapter(size=4),
        lofit(heads=((0, 1), (1, 6))),
        prefix(length=5, hidden=8),
    )
    rng = np.random.default_rng(0)
    rows, length = 8, 24
    batch = {
        "tokens": rng.integers(1, 200, (rows, length), np.int32),
        "targets": rng.integers(1, 200, (rows, length), np.int32),
        "loss_weights": rng.integers(0, 2, (rows, length)).astype(np.float32),
        "segment_ids": np.repeat([[1, 2, 0]], [10, 10, 4], axis=1).repeat(rows, 0).astype(np.int32),
        "positions": np.concatenate([np.arange(10), np.arange(10), np.arange(4)])[None]
        .repeat(rows, 0)
        .astype(np.int32),
    }
    batch["loss_weights"][:, 20:] = 0
    one = make_sharder(make_mesh(devices=jax.devices()[:1]), num_heads=8, num_kv_heads=4)
    trained, variables, found = [part.collection for part in parts], None, []
    for s in (sharder((2, 2, 2, 1)), one):
        bound = bind(Transformer(shape, sharder=s), parts)
        boxed = jax.eval_shape(bound.init, jax.random.key(0))
        shardings = s.tree(boxed)
        if variables is None:
            drawn = jax.tree.map(lambda x: noise(rng, x), nn.unbox(boxed))
            variables = jax.device_get(bound.start(jax.device_put(drawn, shardings), trained))
            _check_lora_start(variables)
            variables |= {name: jax.tree.map(lambda x: x + noise(rng, x), variables[name]) for name in trained}
        trainable, frozen = split(jax.device_put(variables, shardings), trained)
        gradients = jax.jit(make_gradients(bound, token_objective(sft(), s)))
        loss, grads, _ = gradients(trainable, frozen, jax.device_put(batch, s.batch()), 0)
        found.append(jax.device_get((loss, grads)))
    close(*found)


def noise(rng, x):
    return rng.normal(scale=0.1, size=x.shape).astype(x.dtype)


def _check_lora_start(variables):
    """The largest singular triplets, and the lengths of the columns."""
    kernel, numbers = (variables[name]["layers"]["mlp"]["down"] for name in ("params", "lora"))
    u, s, v = np.linalg.svd(kernel["kernel"])
    close(2 * numbers["a"] @ numbers["b"], (u[..., :2] * s[:, None, :2]) @ v[:, :2])
    close(numbers["m"], np.linalg.norm(kernel["kernel"], axis=1))


@dataclasses.dataclass(frozen=True)
class Read(Bound):
    """A model that has read its batch: objectives with other heads share one pass."""

    states: jax.Array | None = None

    def hidden(self, variables, batch, **options):
        return self.states, None


# Losses of whole answers, of other data than pairs; the means of the first two are over the answers of all devices.
ANSWERS = {
    # name: (loss, answers to a prompt, objective)
    "labels": (unpaired.kto(beta=0.5), 2, sequence_objective),
    "rankings": (
        combine(losses=(ranked.clha(), ranked.plackett_luce_dpo()), weights=(0.1, 1)),
        4,
        sequence_objective,
    ),
    "rewards": (
        combine(losses=(reward.preference_pretraining(), reward.bradley_terry(margin=True)), weights=(0.1, 1)),
        2,
        reward_objective.make,
    ),
}


def answers():
    """Losses and metrics of labelled, ranked and rewarded answers, and the gradient of their sum, on a mesh are those
    of one device."""
    shape = tiny_policy.config(hidden_size=32, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4)
    rng, rows, lengths = np.random.default_rng(0), 8, (12, 7, 10, 5, 6)
    segments = np.repeat([1, 2, 3, 4, 0], lengths)[None].repeat(rows, 0)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(rows, 0)
    is_last = np.isin(np.arange(40), np.cumsum(lengths) - 1)
    batch = {
        "tokens": rng.integers(1, 200, (rows, 40), np.int32),
        "targets": rng.integers(1, 200, (rows, 40), np.int32),
        "loss_weights": ((segments > 0) & (positions > 1) & ~is_last).astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "scores": np.take_along_axis(rng.integers(0, 4, (rows, 5)) * 2.0, segments, axis=1).astype(np.float32),
        "reference_logps": -7 + rng.standard_normal((rows, 40), np.float32),
        "token_ids": np.arange(rows * 40, dtype=np.int32).reshape(rows, 40),
    }
    one = make_sharder(make_mesh(devices=jax.devices()[:1]), num_heads=8, num_kv_heads=4)
    variables, found = None, []
    for s in (one, sharder((2, 2, 2, 1))):
        bound = bind(Transformer(shape, sharder=s, remat="none"), [reward_head()])
        objectives = {name: make(loss, count, s) for name, (loss, count, make) in ANSWERS.items()}

        def total(variables, batch, bound=bound, objectives=objectives):
            states, values = bound.hidden(variables, batch)[0], {}
            for name, objective in objectives.items():
                read = Read(bound.model, bound.tuners if name == "rewards" else (), states)
                summed, sums = objective.sums(read, variables, objective.prepare(batch), jax.random.key(0))
                values[name] = summed / objective.count(batch), sums
            return sum(value for value, _ in values.values()), values

        boxed = jax.eval_shape(bound.init, jax.random.key(0))
        variables = variables or jax.tree.map(lambda x: 4 * noise(rng, x), nn.unbox(boxed))
        placed = jax.device_put((variables, batch), (s.tree(boxed), s.batch()))
        found.append(jax.device_get(jax.jit(jax.value_and_grad(total, has_aux=True))(*placed)))
    close(*found)
    (_, values), gradient = found[0]
    assert values["labels"][1]["kl"][0] > 0 and all(map(np.any, jax.tree.leaves(gradient)))


SOFT = configs.spec("prompt_tuning", length=4, prompts=2)
ADAPTER = configs.spec("adapter", placement="parallel")
# A loss that sorts the answers of the whole batch, a reference of its own, and a term that counts the batch's tokens.
PREFERENCE = configs.spec("combine", losses=(configs.spec("aot"), configs.spec("chosen_sft")), weights=(1.0, 0.1))
LEARNED = {
    # name: (objective, tuners, trained, transforms, mask)
    "nine heads": ("sft", (), (), (), None),
    "answers": (PREFERENCE, (), (), (), None),
    "draws": ("one_token_rollout", (), (), ("masked_thought",), None),
    "reference": ("asft", (), (), (), None),
    "a frozen prompt": ("asft", (SOFT,), ("params",), (), None),
    "a trained prompt": ("dft", (SOFT,), (), (), None),
    "tuners": ("sft", ("ia3", ADAPTER, configs.spec("prefix", hidden=8)), (), (), None),
    "a mask": ("sft", (), (), (), "half"),
}


def methods():
    """One objective, transform, kind of tuner and mask: 2 x 2 x 2 devices give the losses of one, random draws too, and
    a state that was saved and restored between two steps ends in the same bits; three devices do with SmolLM2's."""
    few = ["model.compute_dtype=float32", "stages[0].batch_size=8", "stages[0].sequence_length=40"]
    recipe = configs.load("configs/pod.py", few)
    spec = lambda chosen: configs.spec(chosen) if isinstance(chosen, str) else chosen  # noqa: E731
    for name, (objective, tuners, train, transforms, mask) in LEARNED.items():
        with recipe.unlocked():
            stage = recipe.stages[0]
            with stage.unlocked():
                stage.objective, stage.train = spec(objective), train
                stage.tuners, stage.transforms = tuple(map(spec, tuners)), tuple(map(spec, transforms))
                stage.mask = mask and spec(mask)
                stage.schedule = configs.spec("constant", peak=1e-2, warmup=0.0)
        losses, (heads, groups, *meshes) = [], (9, 3, (1, 1, 3)) if name == "nine heads" else (8, 4, (2, 2, 2))
        shape = tiny_policy.config(
            hidden_size=8 * heads, intermediate_size=16 * heads, num_attention_heads=heads, num_key_value_heads=groups
        )
        for sizes in ((1, 1, 1), *meshes):
            mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)), devices=jax.devices()[: math.prod(sizes)])
            s = make_sharder(mesh, num_heads=heads, num_kv_heads=groups)
            step, arguments, _ = abstract_step(recipe, recipe.stages[0], shape, s, "float32")
            found, is_same = stopped(step, arguments)
            losses.append(found)
            assert is_same, (name, sizes)
        np.testing.assert_allclose(*losses, rtol=1e-5, err_msg=name)
        assert losses[0][0] != losses[0][1], name


def stopped(step, arguments):
    """Losses of two steps, and whether a state that was saved and restored between them ends in the same bits."""
    state, frozen, batch = values(*arguments)
    state, first = step(state, frozen, batch)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(arguments[0]), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), (leaf.sharding, wanted)
    with tempfile.TemporaryDirectory() as folder, Checkpoints(pathlib.Path(folder) / "c", keep_last=1) as kept:
        kept.save(1, state)
        kept.wait()
        restored, _ = kept.restore(arguments[0])
    state, second = step(state, frozen, batch)
    again, _ = step(restored, frozen, batch)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, again)
    return [float(first["loss"]), float(second["loss"])], all(jax.tree.leaves(same))


def values(state, frozen, batch):
    """Seeded values of the arguments of a step, the same on every mesh."""
    rng = np.random.default_rng(0)

    def value(path, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            x = np.zeros(leaf.shape) if not leaf.ndim else rng.integers(1, 200, leaf.shape)
        else:
            x = rng.standard_normal(leaf.shape) * 0.1
        return jax.device_put(x.astype(leaf.dtype), leaf.sharding)

    state, frozen, batch = jax.tree.map_with_path(value, (state, frozen, batch))
    state = state.replace(opt_state=jax.tree.map(lambda x: x * 0, state.opt_state))
    rows = batch["tokens"].shape
    time = np.arange(rows[1])
    ids, positions, weights = np.ones_like(time), time, np.ones(rows[1], np.float32)
    if "scores" in batch:  # two answers a row
        ids = time // (rows[1] // 2) + 1
    elif "prompt_slots" not in batch:  # two texts a row, then padding
        ends = (rows[1] * 3 // 8, rows[1] * 7 // 8)
        ids = np.where(time < ends[0], 1, np.where(time < ends[1], 2, 0))
        positions = time - np.where(ids == 2, ends[0], 0)
        weights = weights * (ids > 0)
    for name, row in (("segment_ids", ids), ("positions", positions), ("loss_weights", weights)):
        value = jnp.asarray(row, batch[name].dtype)[None].repeat(rows[0], 0)
        batch[name] = jax.device_put(value, batch["tokens"].sharding)
    if "prompt_slots" in batch:
        slots = np.full(rows, -1, np.int32)
        slots[:, :4] = np.arange(4) + 4 * (np.arange(rows[0]) % 2)[:, None]
        batch["prompt_slots"] = jax.device_put(jnp.asarray(slots), batch["tokens"].sharding)
    return state, frozen, batch


def _run(compiled, *arguments):
    """Metrics of two steps."""
    state, frozen, batch = values(*arguments)
    for _ in range(2):
        state, metrics = compiled(state, frozen, batch)
        yield metrics


if __name__ == "__main__":
    for check in sys.argv[1:]:
        globals()[check]()
