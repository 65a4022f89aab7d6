"""`attention=auto` takes splash on TPUs, and cuDNN's kernel only where cuDNN has one (limits as in JAX's
check_is_flash_attention)."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier.models import attention
from luthier.parallel import Sharder


@pytest.mark.parametrize(
    "platform, capability, dtype, head_dim, softcap, chosen",
    [
        ("cpu", None, jnp.bfloat16, 64, None, "xla"),
        ("tpu", None, jnp.bfloat16, 64, 50.0, "splash"),
        ("gpu", "8.0", jnp.bfloat16, 64, None, "cudnn"),
        ("gpu", "8.9", jnp.float16, 128, None, "cudnn"),
        ("gpu", "10.0", jnp.bfloat16, 256, None, "cudnn"),
        ("gpu", "9.0", jnp.float32, 64, None, "xla"),
        ("gpu", "9.0", jnp.bfloat16, 64, 50.0, "xla"),  # Gemma 2
        ("gpu", "7.5", jnp.float16, 64, None, "xla"),  # a T4
        ("gpu", "8.0", jnp.bfloat16, 256, None, "xla"),  # Gemma 3 on an A100
        ("gpu", "9.0", jnp.bfloat16, 256, None, "cudnn"),
        ("gpu", "9.0", jnp.bfloat16, 36, None, "xla"),
        ("gpu", "gfx942", jnp.bfloat16, 64, None, "xla"),  # ROCm names its devices otherwise
    ],
)
def test_auto_fits_the_device(platform, capability, dtype, head_dim, softcap, chosen):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert attention.automatic(device, jnp.dtype(dtype), head_dim, softcap) == chosen


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_what_cudnn_is_asked_for_is_this_attention(monkeypatch, local, prefix):
    """On packed rows, where its kernel skips what is above the diagonal but for prefixes; XLA answers here."""
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: asked(*a, **k))
    segments = jnp.array([[1] * 5 + [2] * 6 + [0], [3] * 11 + [0]])
    positions = jnp.array([[*range(5), *range(6), 0], [*range(11), 0]])
    fields = {"segment_ids": segments, "positions": positions} | ({"prefix_mask": positions < 3} if prefix else {})
    mask = attention.make_mask(fields, fields, 3, plain=not prefix)
    q, k, v = (jnp.array(np.random.default_rng(n).normal(size=(2, 12, heads, 8))) for n, heads in enumerate((4, 2, 2)))
    answers = [
        attention.attend(backend, q, k, v, mask, jnp.array(local), None, Sharder()) for backend in ("cudnn", "xla")
    ]
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(*(np.asarray(one)[real] for one in answers), atol=1e-6)
