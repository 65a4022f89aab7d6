"""What a step needs, by closed form: before anything is compiled, and for slices that libtpu does not describe.

FLOPs and received bytes are those of the compiled program within a few percent, memory within a fifth
(`tests/test_estimate.py`): enough to say which of many meshes are worth a compilation.
"""

import dataclasses
from collections.abc import Mapping

from luthier.models import ModelConfig
from luthier.training.aot import Slice
from luthier.training.flops import causal_share


@dataclasses.dataclass(frozen=True)
class Layers:
    """The products of a decoder-only transformer with weights.

    Attributes:
      products: (inputs, outputs) of each weight of a layer, in order.
      attention: query heads times their size; `key_value` heads times theirs.
      windows: each layer's sliding window in tokens, None where it sees all.
      post_norms: the last product's result is normed, so that recomputation makes it again.
    """

    products: tuple[tuple[int, int], ...]
    attention: int
    key_value: int
    windows: tuple[int | None, ...]
    embed: int
    vocab: int
    post_norms: bool = False

    @classmethod
    def of(cls, shape: ModelConfig) -> "Layers":
        embed, mlp = shape.hidden_size, shape.intermediate_size
        attention, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        return cls(
            products=(
                (embed, attention),
                (embed, key_value),
                (embed, key_value),
                (attention, embed),
                (embed, mlp),
                (embed, mlp),
                (mlp, embed),
            ),
            attention=attention,
            key_value=key_value,
            windows=tuple(shape.sliding_window if local else None for local in shape.local_layers),
            embed=embed,
            vocab=shape.vocab_size,
            post_norms=shape.post_norms,
        )

    @property
    def layer(self) -> int:
        """Numbers in one layer's matrices."""
        return sum(i * o for i, o in self.products)

    @property
    def head(self) -> int:
        return self.embed * self.vocab

    @property
    def matrices(self) -> int:
        """Numbers in all matrices that multiply a token."""
        return len(self.windows) * self.layer + self.head


@dataclasses.dataclass(frozen=True)
class Work:
    """One step, whatever the mesh.

    Attributes:
      rows, length: of the batch, in tokens.
      remat: as `model.remat`.
      trains_model: its weights are trained, not tuners alone.
      tuner: numbers that tuners train.
      state_bytes: of what is trained and its moments.
      frozen_bytes: of weights that are not trained.
      activation_bytes: of one activation.
      compares: a reference model reads the batch as well, forwards only.
      makes_logits_twice: the loss is of whole sequences, whose logits are made again for the gradient of the head.
    """

    rows: int
    length: int
    state_bytes: float
    frozen_bytes: float = 0.0
    remat: str = "full"
    trains_model: bool = True
    tuner: int = 0
    activation_bytes: int = 2
    compares: bool = False
    makes_logits_twice: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one chip and step, as in `aot.Check`: FLOPs, bytes received, bytes of memory at the peak, {what: seconds}."""

    flops: float
    received: float
    peak: float
    bounds: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return max(self.bounds.values())


def estimate(layers: Layers, work: Work, mesh: Mapping[str, int], place: Slice, *, micro_batches: int = 1) -> Estimate:
    """What a chip of a slice needs for a step on a mesh {axis: size}."""
    chips = mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["sequence"]
    flops = step_flops(layers, work) / chips
    gathered, received = _received(layers, work, mesh, micro_batches)
    parts = mesh["fsdp"] * mesh["sequence"] * mesh["tensor"]
    moved = (2 * work.state_bytes + work.frozen_bytes) / parts + 2 * gathered
    bounds = {"compute": flops / place.chip.flops, "memory": moved / place.chip.memory_bandwidth}
    if place.network_bandwidth():
        bounds["network"] = received / place.network_bandwidth()
    return Estimate(flops, received, _peak(layers, work, mesh, micro_batches), bounds)


def step_flops(layers: Layers, work: Work) -> float:
    """2 · m · n · k over every matrix product of a step, over all chips.

    A weight multiplies a token forwards, again where `remat` is `full` (but for a layer's last product, whose result
    only a norm would read), and backwards once for its input and once for itself. Attention has two products
    forwards, as many again where `remat` is `full`, and seven in splash attention's two kernels backwards. A reference
    model only goes forwards.
    """
    tokens, count, full = work.rows * work.length, len(layers.windows), work.remat == "full"
    last = 0 if layers.post_norms else layers.products[-1][0] * layers.products[-1][1]
    passes = 3 if work.trains_model else 2
    weights = count * (passes * layers.layer + full * (layers.layer - last))
    weights += (passes + work.makes_logits_twice) * layers.head + work.compares * layers.matrices
    keys = sum(work.length * causal_share(work.length, window) for window in layers.windows)
    attention = ((11 if full else 9) + 2 * work.compares) * keys * layers.attention
    return 2.0 * tokens * (weights + (3 + full) * work.tuner + attention)


def _received(layers: Layers, work: Work, mesh: Mapping[str, int], micro_batches: int) -> tuple[float, float]:
    """(bytes of gathered weights, bytes received)."""
    data, fsdp, tensor, sequence = (mesh[axis] for axis in ("data", "fsdp", "tensor", "sequence"))
    size, count, split = work.activation_bytes, len(layers.windows), fsdp * sequence
    others = lambda n: (n - 1) / n  # noqa: E731 — of what n chips hold in equal parts, what one lacks
    body = count * layers.layer
    weights = 2 * body + layers.head + work.compares * (body + layers.head)
    gathered = micro_batches * size * weights / tensor if split > 1 else 0.0
    received = gathered * others(split)
    if work.trains_model:
        gradient = 4.0 * (body + layers.head) / tensor
        received += micro_batches * gradient * (others(split) + 2 / split * others(data))
    # Activations of all rows of a step; micro-batches change nothing.
    tokens = work.rows * work.length / (data * fsdp)
    sums = 7 + (work.remat == "full")
    received += count * sums * 2 * others(tensor) * tokens / sequence * layers.embed * size
    kept = layers.key_value / min(tensor, layers.key_value)
    received += count * 4 * others(sequence) * tokens * 2 * kept * size
    return gathered, received


def _peak(layers: Layers, work: Work, mesh: Mapping[str, int], micro_batches: int) -> float:
    """Weights and moments, gradients, kept activations, and the larger of a layer and the head at work."""
    parts, tensor = mesh["fsdp"] * mesh["sequence"] * mesh["tensor"], mesh["tensor"]
    trained = layers.matrices if work.trains_model else work.tuner
    held = (work.state_bytes + work.frozen_bytes + 4 * trained * (1 + (micro_batches > 1))) / parts
    tokens = work.rows * work.length / (mesh["data"] * mesh["fsdp"] * mesh["sequence"] * micro_batches)
    size = work.activation_bytes
    wide = sum(outputs for _, outputs in layers.products) / tensor
    kept = layers.embed + (0 if work.remat == "full" else wide + layers.attention / tensor)
    one = 2 * size * layers.layer / tensor + tokens * size * (wide + 4 * layers.embed)
    head = (size + 4 * work.trains_model) * layers.head / tensor
    return held + len(layers.windows) * tokens * size * kept + max(one, head)
