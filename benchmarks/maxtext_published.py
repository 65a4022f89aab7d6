"""The roofline bound beside step times that MaxText's authors publish: none may beat it, and it should rank them.

    python benchmarks/maxtext_published.py  # seconds; the table in Markdown and how well the bound ranks the runs

Nothing is compiled (the slices have up to 8,192 chips): FLOPs and received bytes are the closed forms of
`luthier.training.estimate`, which the tests hold against compiled programs. The JSON file beside this names file and
commit of every figure.
"""

import dataclasses
import itertools
import json
import math
import pathlib

from scipy import stats

from luthier.training.aot import CHIPS, Slice
from luthier.training.estimate import Estimate, Layers, Work, estimate

PUBLISHED = pathlib.Path(__file__).with_name("maxtext_published.json")


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run and what bounds it.

    Attributes:
      seconds: a step, as published, or the model FLOPs by MaxText's own count over the published rate.
      own: of a program that recomputes as the run did: everything but a layer's last product, or nothing.
      ours: of our program with full remat, as `configs/pod.py` trains.
    """

    run: dict
    seconds: float
    own: Estimate
    ours: Estimate

    @property
    def tokens(self) -> int:
        """A chip's, in one step."""
        return self.run["rows_per_chip"] * self.run["length"]


def load() -> dict:
    return json.loads(PUBLISHED.read_text())


def rows() -> list[Row]:
    published = load()
    return [_row(run, published["models"][run["model"]]) for run in published["runs"]]


def layers_of(model: dict) -> Layers:
    embed, mlp = model["embed"], model["mlp"]
    attention, key_value = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    up = ((embed, mlp),) * (model["mlp_matrices"] - 1)
    each, window = model.get("global_every", 1), model.get("window")
    return Layers(
        products=((embed, attention), (embed, key_value), (embed, key_value), (attention, embed), *up, (mlp, embed)),
        attention=attention,
        key_value=key_value,
        windows=tuple(None if (index + 1) % each == 0 else window for index in range(model["layers"])),
        embed=embed,
        vocab=model["vocab"],
        post_norms=window is not None and each > 1,
    )


def published_flops(layers: Layers, run: dict) -> float:
    """Model FLOPs of a chip and step, as MaxText counted them when it published the run."""
    length = run["length"]
    seen = [min(window or length, length) for window in layers.windows]
    attention = 12 * layers.attention * sum(seen) / (2 if run["counts_attention"] == "causal" else 1)
    return run["rows_per_chip"] * length * (6 * layers.matrices + attention)


def _row(run: dict, model: dict) -> Row:
    layers = layers_of(model)
    seconds = run.get("seconds") or published_flops(layers, run) / (run["tflops_per_chip"] * 1e12)
    mesh = {"data": run["slices"], "tensor": 1, "sequence": 1, **run["mesh"]}
    place = Slice(run["slice"], run["slices"], CHIPS[run["generation"]])
    work = Work(
        rows=run["rows_per_chip"] * math.prod(mesh.values()), length=run["length"], state_bytes=12 * layers.matrices
    )
    least = dataclasses.replace(work, remat="full" if run["remat"] == "full" else "dots")
    return Row(run, seconds, estimate(layers, least, mesh, place), estimate(layers, work, mesh, place))


def ranks(measured: list[float], bounds: list[float], apart: float = 0.05) -> tuple[float, int, int]:
    """(Spearman's correlation, pairs in the same order, pairs) — pairs whose bounds are more than 5% apart."""
    pairs = [
        (measured[a] - measured[b]) * (bounds[a] - bounds[b]) > 0
        for a, b in itertools.combinations(range(len(bounds)), 2)
        if abs(math.log(bounds[a] / bounds[b])) > math.log1p(apart)
    ]
    return float(stats.spearmanr(measured, bounds).statistic), sum(pairs), len(pairs)


def main() -> None:
    found = rows()
    print("| run | rows a chip × tokens | published s | bound s | by | published / bound | with the run's own remat |")
    print("|---|--:|--:|--:|---|--:|--:|")
    for row in sorted(found, key=lambda row: row.ours.seconds):
        by = max(row.ours.bounds, key=row.ours.bounds.get)
        cells = [row.run["name"], f"{row.run['rows_per_chip']} × {row.run['length']:,}", f"{row.seconds:.2f}"]
        cells += [f"{row.ours.seconds:.2f}", by, f"{row.seconds / row.ours.seconds:.2f}"]
        print("| " + " | ".join([*cells, f"{row.seconds / row.own.seconds:.2f}"]) + " |")
    groups = {"all": found, "one slice": [row for row in found if row.run["slices"] == 1]}
    for generation in ("v5e", "v5p", "v6e"):
        groups[f"{generation}, one slice"] = [row for row in groups["one slice"] if row.run["generation"] == generation]
    for name, group in groups.items():
        for what, size in (("seconds a step", lambda row: 1), ("seconds a token and chip", lambda row: row.tokens)):
            measured = [row.seconds / size(row) for row in group]
            spearman, same, pairs = ranks(measured, [row.ours.seconds / size(row) for row in group])
            print(f"{name}, {what}: {len(group)} runs, Spearman {spearman:.3f}, {same} of {pairs} pairs in order")


if __name__ == "__main__":
    main()
