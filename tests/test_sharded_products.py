"""Products, lookups, attention and losses on 8 simulated devices equal those of one, and say no more than needed."""

import pathlib
import subprocess
import sys

import pytest
import tiny_run

from luthier.parallel import make_mesh, make_sharder, sum_parts

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("check", ["products", "scatters", "messages tuners answers", "splash", "steps methods"])
def test_on_eight_devices(check, tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "eight_devices.py"), *check.split()],
        env=tiny_run.environment(8, tmp_path),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "topology, shape, spec",
    [
        ("v5e:8x8", (14336, 4096), (None, "fsdp")),  # parts of 64 columns
        ("v5e:8x8", (4096, 128256), ("fsdp", None)),  # 1002 registers wide
        ("v5e:16x16", (4096, 4096), (None, "fsdp")),
        ("v5e:8x8", (28672, 16), ("fsdp", None)),  # of a LoRA
        ("v5e:8x8", (16, 28672), (None, "fsdp")),
    ],
)
def test_a_gradient_is_scattered_on_tpus(topology, shape, spec):
    """libtpu writes a scatter, not a sum that everybody gets whole, whatever the slice and the matrix."""
    pytest.importorskip("libtpu")
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from luthier.training.aot import describe
    from luthier.training.hlo import collectives

    mesh = make_mesh(data=1, fsdp=-1, devices=describe(topology).devices)
    sharder = make_sharder(mesh, num_heads=8, num_kv_heads=8)

    def gradient(x, g):
        dw = jnp.einsum("ti,to->io", x, g, preferred_element_type=jnp.float32)
        return sum_parts(dw, ("fsdp",), P(*spec), sharder)

    rows = NamedSharding(mesh, P("fsdp"))
    x, g = (jax.ShapeDtypeStruct((mesh.size * 512, size), jnp.bfloat16, sharding=rows) for size in shape)
    on_mesh = jax.shard_map(gradient, mesh=mesh, in_specs=P("fsdp"), out_specs=P(*spec), check_vma=False)
    found = {one.kind: one for one in collectives(jax.jit(on_mesh).lower(x, g).compile().as_text(), mesh.shape)}
    assert "reduce-scatter" in found and "all-reduce" not in found
    assert found["reduce-scatter"].wire_bytes <= 1.1 * 4 * shape[0] * shape[1]
