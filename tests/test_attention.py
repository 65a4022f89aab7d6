"""`attention=auto` takes splash on TPUs, and cuDNN's kernel only where cuDNN has one (limits as in JAX's
check_is_flash_attention)."""

import types

import jax.numpy as jnp
import pytest

from luthier.models import attention


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
