"""The device mesh: four named axes, of which any may be 1."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from luthier.errors import LuthierError

AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(*, data: int = -1, fsdp: int = -1, tensor: int = 1, sequence: int = 1, devices=None) -> Mesh:
    """A mesh over all devices (or the given ones); a size of -1 takes what is left.

    Where `data` and `fsdp` are both -1, `data` takes the slices and `fsdp` the devices within one: weights are
    spread as far as fast links go.

    On TPUs the mesh runs through the torus line by line, so that the last axes join neighbours. Of several
    slices, joined by the data centre's network, each holds its own part of `data`.

    Raises:
      LuthierError: when the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    if data == fsdp == -1:
        sizes["data"] = _slices(devices)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise LuthierError("only one size may be -1", where="mesh", mend=f"Fix all but one of {', '.join(free)}")
    if any(size < 1 for size in sizes.values() if size != -1):
        raise LuthierError(f"sizes must be positive or -1, got {sizes}", where="mesh")
    if devices.size % fixed or (not free and fixed != devices.size):
        raise LuthierError(
            f"{' x '.join(f'{a}={n}' for a, n in sizes.items() if n != -1)} does not divide {devices.size} devices",
            where="mesh",
            mend=f"Choose sizes whose product is {devices.size}, or set one to -1",
        )
    if free:
        sizes[free[0]] = devices.size // fixed
    return Mesh(_arranged(devices, [sizes[axis] for axis in AXES]), AXES)


def make_inference_mesh(*, num_heads: int, num_kv_heads: int, devices=None) -> Mesh:
    """The mesh of all devices to ask a model on: heads over `tensor` as far as they go in a slice, rows over `data`.

    A pass over one token a row reads every weight. Split over `tensor` each device reads its part and sends only
    activations; split over `fsdp` the weights themselves would be sent for each token.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    room = devices.size // _slices(devices)
    fits = lambda n: not (room % n or num_heads % n or (num_kv_heads % n and n % num_kv_heads))  # noqa: E731
    return make_mesh(fsdp=1, tensor=max(n for n in range(1, room + 1) if fits(n)), devices=devices)


def _arranged(devices: np.ndarray, shape: list[int]) -> np.ndarray:
    if devices.flat[0].platform == "tpu":
        slices = _slices(devices)
        if shape[0] % slices:
            raise LuthierError(
                f"data={shape[0]} does not divide over {slices} slices",
                where="mesh.data",
                mend=f"Use a multiple of {slices}",
            )
        devices = np.asarray(sorted(devices.flat, key=_place))
    return devices.reshape(shape)


def _slices(devices: np.ndarray) -> int:
    """TPU slices, between which only the data centre's network goes."""
    on_tpu = devices.flat[0].platform == "tpu"
    return len({getattr(device, "slice_index", 0) for device in devices.flat}) if on_tpu else 1


def _place(device) -> tuple:
    return (getattr(device, "slice_index", 0), *reversed(device.coords), device.core_on_chip)


def torus_sizes(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Sizes of the lines of the torus that a mesh axis runs through, outermost first; the axis's size where unknown."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])[0]
    if not hasattr(devices[0], "coords"):
        return (len(devices),)
    places = np.array([_place(device) for device in devices])
    values = [np.unique(column) for column in places.T]
    grid = np.stack(np.meshgrid(*values, indexing="ij"), axis=-1).reshape(-1, len(values))
    if not np.array_equal(grid, places):
        return (len(devices),)
    return tuple(len(value) for value in values if len(value) > 1)
