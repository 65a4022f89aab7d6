"""The real step compiled for TPU slices that are not here."""

import json

import pytest
import tiny_run

from luthier import config as configs
from luthier.cli.main import main
from luthier.errors import LuthierError
from luthier.models.presets import PRESETS, preset

STAGE = """
    c.stage(data=DATA, steps=20, batch_size=8, sequence_length=256, tuners=({tuner}),
            optimizer=c.spec("adamw", first_moment_dtype="bfloat16"))
"""
MODEL = ', compute_dtype="bfloat16", remat="full"'
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
SHORT = ["--config.stages[0].batch_size=1", "--config.stages[0].sequence_length=64"]


@pytest.fixture(scope="module", params=["", 'c.spec("lora"),'], ids=["full", "lora"])
def recipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    return tiny_run.write_run(folder, STAGE.format(tuner=request.param), model=MODEL, **SHAPE)


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu")


def test_a_step_for_four_chips(recipe, libtpu, tmp_path, capsys):
    words = [f"--config.mesh.{axis}={size}" for axis, size in {"fsdp": 2, "tensor": 2, "data": 1}.items()]
    out = tmp_path / "check.json"
    code = main(["compile-check", f"--config={recipe}", "--topology=v5e:2x2", f"--out={out}", *words])
    shown = capsys.readouterr()
    assert code == 0 and "fits" in shown.out, shown.err
    record = json.loads(out.read_text())
    assert record["fits"] and 0 < record["peak"] < 2**30
    assert record["bound_seconds"] == max(record["bounds"].values())
    # What a chip holds, by kind: the compiler's count of all arguments, but for steps and padding (a LoRA's parts are
    # narrower here than a register).
    held = record["held"]
    assert sum(held.values()) == pytest.approx(record["arguments"], rel=0.1 if "frozen weights" in held else 0.05)
    assert held.keys() - {"frozen weights"} == {"trained weights", "optimizer state", "batch"}
    # A first moment in bfloat16 and a second in float32, of the float32 weights.
    assert held["optimizer state"] == pytest.approx(1.5 * held["trained weights"], rel=0.001)
    assert all(f"  {kind}" in shown.out for kind in held)
    kinds = {(one["kind"], one["axes"]) for one in record["collectives"]}
    assert ("all-gather", "fsdp") in kinds and ("reduce-scatter", "fsdp") in kinds


@pytest.mark.parametrize("recipe", [""], indirect=True)
def test_a_search_lists_what_fits(recipe, libtpu, tmp_path, capsys):
    out = tmp_path / "search.json"
    words = ["compile-check", f"--config={recipe}", "--topology=v5e:2x2", f"--out={out}", "--search=2"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "compiled 2/2" in shown.err and "micro-batches" in shown.out
    best, other = json.loads(out.read_text())["results"]
    assert best["fits"] and best["mesh"] != other["mesh"] and best["micro_batches"] == 1
    assert best["bound_seconds"] <= 1.01 * other["bound_seconds"]
    sizes = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best["mesh"].items())
    assert f"best    {sizes} --config.stages[0].micro_batches=1 --config.model.remat=dots" in shown.out
    assert best["remat"] == "dots"  # memory is plenty, so nothing is multiplied twice


def test_what_does_not_fit_is_said(libtpu, capsys):
    words = ["--topology=v5e:1x1", "--model=llama3-8b", "--config.stages[0].batch_size=1"]
    assert main(["compile-check", "--config=configs/pod.py", *words]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "optimizer state" in shown  # so that it is seen what does not


@pytest.mark.parametrize(
    "words, said",
    [
        (["--topology=v5e:3x3", "--model=llama3-8b"], "Known: v5e:1x1"),
        (["--topology=v5e:2x2", "--model=llama3-9b"], "llama3-8b"),
        (["--topology=v5e:2x2", "--model=llama3-8b", "--config.mesh.fsdp=3"], "mesh"),
        (["--topology=v5e:2x2", "--model=llama3-8b", "--config.stages[0].batch_size=6"], "stage.batch_size"),
        (["--topology=v5e:2x2", "--model=llama3-8b", "--stage=1"], "--stage"),
        (["--topology=v5e:2x2", "--model=llama3-8b", "--prices=setup.cfg"], "not a table of prices"),
        (["--topology=v5e:2x2", "--model=llama3-8b", "--search=0"], "--search"),
        (["--topology=v5e:16x16", "--model=llama3-8b", "--search", *SHORT], "no mesh over 256 chips"),
    ],
)
def test_bad_input(words, said, libtpu, capsys):
    assert main(["compile-check", "--config=configs/pod.py", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("name, billions", [("llama3-8b", 8.03), ("llama3-70b", 70.55), ("qwen3-1.7b", 1.72)])
def test_presets_are_the_models(name, billions):
    """Sizes as their authors publish them."""
    import jax

    from luthier.models import Transformer
    from luthier.tuners import bind

    shapes = jax.eval_shape(bind(Transformer(preset(name))).init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9, 2) == billions


def test_known_presets():
    with pytest.raises(LuthierError, match="llama3-8b"):
        preset("llama3-8")
    assert configs.load("configs/pod.py:lora").stages[0].tuners[0].name == "lora"
    assert len(PRESETS) >= 5


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_flops_are_the_analytic_count(tune):
    """2·N a token and pass over N weights; recomputation leaves out the last product of a layer; attention apart."""
    import jax

    from luthier.training.aot import abstract_step
    from luthier.training.flops import matmul_flops
    from luthier.training.run import config_sharder

    tokens, length, rank = 2 * 512, 512, 16
    config = configs.load(f"configs/pod.py:{tune}", ["stages[0].batch_size=2", f"stages[0].sequence_length={length}"])
    shape = preset("llama3-8b")
    sharder = config_sharder(config, shape, jax.devices()[:1])
    step, arguments, model_flops = abstract_step(config, config.stages[0], shape, sharder, "bfloat16")

    e, f, kv, layers = 4096, 14336, 1024, 32
    linear = [(e, e), (e, kv), (e, kv), (e, e), (e, f), (e, f), (f, e)]
    layer, last = sum(i * o for i, o in linear), f * e
    head = e * shape.vocab_size
    product = length * length * e * 2 * 2  # q k or p v of one layer, both rows, all heads
    attention = layers * product * (2 + 2 + 5)  # forward, again, and backward with q k a third time
    if tune == "full":
        weights = layers * (layer + (layer - last) + 2 * layer) + 3 * head
        expected = 2 * tokens * weights + attention
    else:
        low = sum(rank * (i + o) for i, o in linear)
        # Frozen weights have no gradient; the recomputation of x A and of (x A) B of the last product is left out too.
        weights = layers * (layer + (layer - last) + layer) + 2 * head
        expected = 2 * tokens * (weights + layers * (low + (low - rank * e) + 2 * low)) + attention
    assert matmul_flops(step.trace(*arguments).jaxpr) == pytest.approx(expected, rel=0.01)
    assert model_flops == pytest.approx(2 * tokens * (3 if tune == "full" else 2) * (layers * layer + head), rel=0.07)


@pytest.mark.parametrize(
    "topology, sizes, lines",
    [
        ("v5e:4x4", {"fsdp": 16}, (4, 4)),
        ("v5e:4x4", {"fsdp": 8, "tensor": 2}, (4, 2)),
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, (4,)),
        ("v5e:2x4", {"fsdp": 8}, (4, 2)),
        ("v5p:2x2x2", {"fsdp": 8}, (2, 2, 2)),
        ("v5e:1x1", {"fsdp": 1}, ()),
    ],
)
def test_a_mesh_runs_through_the_torus_line_by_line(topology, sizes, lines, libtpu):
    from luthier.parallel.mesh import make_mesh, torus_sizes
    from luthier.training.aot import describe

    mesh = make_mesh(data=1, **sizes, devices=describe(topology).devices)
    assert torus_sizes(mesh, "fsdp") == lines
    if "tensor" in sizes:  # neighbours
        coords = [device.coords for device in mesh.devices[0, 0, :, 0]]
        assert all(sum(abs(a - b) for a, b in zip(*pair)) == 1 for pair in zip(coords, coords[1:]))
