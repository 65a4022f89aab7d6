"""Run by test_meshes.py on 8 simulated devices: on a mesh, answers are those of one device.

Usage: mesh_decoding.py DATA FSDP TENSOR
"""

import dataclasses
import sys

import jax
import numpy as np
import tiny_policy

from luthier.decoding import Sampling, generate, score
from luthier.models import Transformer
from luthier.parallel import make_mesh, make_sharder
from luthier.tuners import bind

plain = tiny_policy.policy()
config = plain.bound.model.config
data, fsdp, tensor = map(int, sys.argv[1:])
sharder = make_sharder(
    make_mesh(data=data, fsdp=fsdp, tensor=tensor), num_heads=config.num_heads, num_kv_heads=config.num_kv_heads
)
bound = bind(Transformer(config, remat="none", sharder=sharder))
shardings = sharder.tree(jax.eval_shape(bound.init, jax.random.key(0)))
host = jax.device_get(plain.variables)
variables = jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), host, shardings
)
spread = dataclasses.replace(plain, bound=bound, variables=variables)
local = dataclasses.replace(plain, variables=host)

prompts = ["a", "The quick brown fox", "zebra", "qq", "x" * 20]  # ragged: five rows in batches of four
settings = Sampling(max_new_tokens=6, temperature=1.0, stop=("e",))
for ours, theirs in zip(
    generate(spread, prompts, settings, batch_size=4), generate(local, prompts, settings, batch_size=4)
):
    assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
pairs = [{"prompt": prompt, "completion": " and so on"} for prompt in prompts]
for ours, theirs in zip(score(spread, pairs, batch_size=4), score(local, pairs, batch_size=4)):
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
print("same")
