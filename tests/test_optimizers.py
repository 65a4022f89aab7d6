"""Optimisers against PyTorch's, on weights some of which are stacked by layer and there are one tensor a layer."""

import jax
import numpy as np
import optax
import pytest

from luthier.errors import LuthierError
from luthier.optim import optimizers

LAYERS, RATE, STEPS = 3, 0.02, 4
SHAPES = {"head": (6, 10), "layers": (LAYERS, 10, 6)}


def numbers(seed, size=1.0):
    """Of every leaf; layers differ in size by powers of ten, so that a mean over them is another number."""
    draw = np.random.default_rng(seed)
    tree = {name: {"kernel": size * draw.standard_normal(shape, np.float32)} for name, shape in SHAPES.items()}
    tree["layers"]["kernel"] *= 10.0 ** np.arange(LAYERS, dtype=np.float32)[:, None, None]
    tree["layers"]["norm"] = {"scale": size * draw.standard_normal((LAYERS, 6), np.float32)}
    return tree


def ours(optimizer):
    """The weights after each step."""
    weights, found = numbers(0, 0.1), []
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(numbers(1 + step), state, weights)
        weights = optax.apply_updates(weights, updates)
        found.append(weights)
    return found


def theirs(make):
    """The same by `make`, a torch optimiser of two groups: matrices, and what weight decay leaves alone."""
    torch = pytest.importorskip("torch")

    def apart(tree):
        """One array a layer: a list of matrices and one of scales."""
        return [tree["head"]["kernel"], *tree["layers"]["kernel"]], list(tree["layers"]["norm"]["scale"])

    groups = [[torch.nn.Parameter(torch.tensor(x)) for x in group] for group in apart(numbers(0, 0.1))]
    optimizer, found = make(*groups), []
    for step in range(STEPS):
        for group, grads in zip(groups, apart(numbers(1 + step))):
            for weight, grad in zip(group, grads):
                weight.grad = torch.tensor(grad)
        optimizer.step()
        (head, *matrices), scales = ([x.detach().numpy().copy() for x in group] for group in groups)
        stacked = {"kernel": np.stack(matrices), "norm": {"scale": np.stack(scales)}}
        found.append({"head": {"kernel": head}, "layers": stacked})
    return found


def in_torch(name, decay=0.0, **options):
    def make(matrices, scales):
        import torch

        groups = [{"params": matrices, "weight_decay": decay}, {"params": scales, "weight_decay": 0.0}]
        return getattr(torch.optim, name)(groups, lr=RATE, **options)

    return make


def adafactor_of_transformers(matrices, scales, **options):
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor([*matrices, *scales], lr=RATE, relative_step=False, warmup_init=False, **options)


FACTORED = {"min_dim_size_to_factor": LAYERS + 1}
CASES = {
    "adamw": (optimizers.adamw(lambda _: RATE, weight_decay=0.1), in_torch("AdamW", 0.1)),
    "sgd": (optimizers.sgd(lambda _: RATE), in_torch("SGD")),
    "sgd-momentum": (optimizers.sgd(lambda _: RATE, momentum=0.9), in_torch("SGD", momentum=0.9)),
    "sgd-nesterov": (
        optimizers.sgd(lambda _: RATE, momentum=0.9, nesterov=True),
        in_torch("SGD", momentum=0.9, nesterov=True),
    ),
    "rmsprop": (optimizers.rmsprop(lambda _: RATE), in_torch("RMSprop", alpha=0.99)),
    "adafactor": (
        optimizers.adafactor(lambda _: RATE, **FACTORED),
        lambda *groups: adafactor_of_transformers(*groups, scale_parameter=False),
    ),
    "adafactor-relative": (
        optimizers.adafactor(lambda _: RATE, multiply_by_parameter_scale=True, **FACTORED),
        lambda *groups: adafactor_of_transformers(*groups, scale_parameter=True),
    ),
    "adafactor-momentum": (
        optimizers.adafactor(lambda _: RATE, momentum=0.9, **FACTORED),
        lambda *groups: adafactor_of_transformers(*groups, scale_parameter=False, beta1=0.9),
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_torch(name):
    optimizer, make = CASES[name]
    for found, expected in zip(ours(optimizer), theirs(make)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("relative", [False, True])
def test_adafactor_of_stacked_layers_is_that_of_each_alone(relative):
    """Against optax's, with a leaf for every matrix and vector of a layer."""
    found = ours(optimizers.adafactor(lambda _: RATE, multiply_by_parameter_scale=relative, momentum=0.9, **FACTORED))
    alone = optax.adafactor(lambda _: RATE, multiply_by_parameter_scale=relative, momentum=0.9, **FACTORED)
    apart = lambda tree: [jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(LAYERS)]  # noqa: E731
    weights = apart(numbers(0, 0.1))
    state = alone.init(weights)
    for step, stacked in enumerate(found):
        updates, state = alone.update(apart(numbers(1 + step)), state, weights)
        weights = optax.apply_updates(weights, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), apart(stacked), weights)


def test_adafactor_does_not_take_layers_for_a_side():
    weights = numbers(0)
    optimizers.adafactor(lambda _: RATE, **FACTORED).init(weights)
    few = optimizers.adafactor(lambda _: RATE, min_dim_size_to_factor=LAYERS)
    with pytest.raises(LuthierError, match="min_dim_size_to_factor: 3 does not exceed the number of layers. Give 4"):
        few.init(weights)
    few.init({"layers": {"kernel": weights["layers"]["kernel"]}, "head": weights["head"]})  # its own sides are longer
    with pytest.raises(LuthierError, match="Give 4"):
        few.init({"layers": {"lora": np.ones((LAYERS, 10, 2))}})


def test_lion_is_the_sign_of_an_interpolated_momentum():
    rate, b1, b2, decay = RATE, 0.9, 0.99, 0.1
    weight, momentum = numbers(0, 0.1)["head"]["kernel"], 0.0
    for step, found in enumerate(ours(optimizers.lion(lambda _: rate, weight_decay=decay))):
        grad = numbers(1 + step)["head"]["kernel"]
        weight = weight - rate * (np.sign(b1 * momentum + (1 - b1) * grad) + decay * weight)
        momentum = b2 * momentum + (1 - b2) * grad
        np.testing.assert_allclose(found["head"]["kernel"], weight, rtol=1e-5, atol=1e-7)


def test_adafactor_decays_by_a_share_of_the_matrix_that_the_rate_does_not_scale():
    plain, decayed = (ours(optimizers.adafactor(lambda _: RATE, weight_decay=decay))[0] for decay in (0.0, 0.1))
    start = numbers(0, 0.1)
    for name in SHAPES:
        moved = plain[name]["kernel"] - decayed[name]["kernel"]
        np.testing.assert_allclose(moved, 0.1 * start[name]["kernel"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(plain["layers"]["norm"]["scale"], decayed["layers"]["norm"]["scale"])
