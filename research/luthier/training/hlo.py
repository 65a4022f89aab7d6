"""What a compiled program says to other devices: its collectives, read from the text of its HLO."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "f64": 8}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "c64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes, over one run of the program on one device.

    Attributes:
      kind: a name of `COLLECTIVES`.
      axes: mesh axes that it runs over, such as "fsdp" or "data+fsdp"; "" if they can't be told.
      calls: how often it runs, loops counted.
      output_bytes: of all calls' results.
      wire_bytes: what a device must receive at least: (n − 1)/n of a gathered result, n − 1 parts to reduce.
    """

    kind: str
    axes: str
    calls: int
    output_bytes: int
    wire_bytes: int


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program, the most bytes first.

    Args:
      text: `compiled.as_text()`.
      mesh_shape: {axis: size} of the mesh it was compiled for, in order.
    """
    found = [(*one, match) for one in instructions(text) if (match := _CALL.search(one[2]))]
    sources: dict[str, set] = {}
    for _, _, line, match in found:
        sources.setdefault(_identity(line), set()).add((match[2], _source(line)))
    sums: dict[tuple[str, str], list[float]] = {}
    seen = set()
    for times, computation, line, match in found:
        # The parts of one asynchronous collective share identity and source; those of a shard_map the channel only.
        identity = _identity(line)
        if identity and len(sources[identity]) == 1:
            if identity in seen:
                continue
            seen.add(identity)
        kind, output = match[2], _output_bytes(match[1], match[2], is_start=bool(match[3]))
        members, axes = _group(line, mesh_shape)
        if computation.startswith("all-reduce-scatter"):  # how a TPU's program writes a reduce-scatter
            kind, output = "reduce-scatter", output / members
        received = {
            "all-gather": output * (members - 1) / members,
            "all-reduce": 2 * output * (members - 1) / members,
            "reduce-scatter": output * (members - 1),
            "all-to-all": output * (members - 1) / members,
            "collective-permute": output,
        }[kind]
        total = sums.setdefault((kind, axes), [0, 0, 0])
        for index, value in enumerate((times, times * output, times * received)):
            total[index] += value
    made = [Collective(kind, axes, *(int(value) for value in total)) for (kind, axes), total in sums.items()]
    return sorted(made, key=lambda one: -one.wire_bytes)


_CALL = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")


def _identity(line: str) -> str:
    """Channel and groups; "" without a channel."""
    found = re.search(r"channel_id=\d+", line)
    groups = re.search(r"replica_groups=\S+", line)
    return found[0] + (groups[0] if groups else "") if found else ""


def _source(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """(how often one run of the program executes it, its computation, the line) of each instruction."""
    bodies: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current and line.startswith("  "):
            bodies[current].append(line)
    times = dict.fromkeys(bodies, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], count * _trips(line, bodies[loop[1]]))
                continue
            called = re.findall(r"(?:calls|called_computation|true_computation|false_computation)=%?([\w.\-]+)", line)
            for branches in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                called += re.findall(r"%?([\w.\-]+)", branches)
            if re.search(r"\bcall\(", line):
                called += re.findall(r"to_apply=%?([\w.\-]+)", line)
            for one in called:
                if one in bodies:
                    visit(one, count)

    visit(entry, 1)
    for name, lines in bodies.items():
        for line in lines:
            if times[name]:
                yield times[name], name, line


def _trips(line: str, condition: list[str]) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    constants = [int(n) for text in condition for n in re.findall(r"[su]32\[\][^=]* constant\((\d+)\)", text)]
    return max(constants, default=1)


def _output_bytes(shapes: str, kind: str, *, is_start: bool) -> float:
    sizes = [
        _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        if dtype in _BYTES
    ]
    if not is_start or kind == "all-reduce":
        return sum(sizes)
    # (operands…, results…, and for permutes two contexts)
    sizes = [size for size in sizes if size > 4] if kind == "collective-permute" else sizes
    return sum(sizes[len(sizes) // 2 :])


def _group(line: str, mesh_shape: Mapping[str, int]) -> tuple[int, str]:
    """(devices that take part, names of the mesh axes they differ in)."""
    shape = tuple(mesh_shape.values())
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        ids = [int(n) for n in re.findall(r"\d+", pairs[1])]
        groups = [pair for pair in zip(ids[::2], ids[1::2]) if pair[0] != pair[1]]
        return 2, _axes(groups, mesh_shape)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if counted:
        numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
        ids = np.arange(math.prod(numbers(counted[2]))).reshape(numbers(counted[2]))
        if counted[3]:
            ids = ids.transpose(numbers(counted[3]))
        groups = ids.reshape(numbers(counted[1])).tolist()
    elif named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        order = [name for name in sizes if name not in chosen] + chosen
        ids = ids.transpose([list(sizes).index(name) for name in order])
        groups = ids.reshape(-1, math.prod(sizes[name] for name in chosen)).tolist()
    elif listed:
        groups = [[int(n) for n in re.findall(r"\d+", group)] for group in re.findall(r"\{([^{}]*)\}", listed[1])]
    else:
        groups = [list(range(math.prod(shape)))]
    return len(groups[0]), _axes(groups, mesh_shape)


def _axes(groups, mesh_shape: Mapping[str, int]) -> str:
    shape = tuple(mesh_shape.values())
    if any(max(group) >= math.prod(shape) for group in groups):
        return ""
    places = [np.array(np.unravel_index(np.array(group), shape)) for group in groups]
    moving = [any(len(set(place[axis].tolist())) > 1 for place in places) for axis in range(len(shape))]
    return "+".join(name for name, moves in zip(mesh_shape, moving) if moves)
