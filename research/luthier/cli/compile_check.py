"""Compiles a recipe's real train step for a TPU slice that is not here, and says whether it fits.

Memory and collectives are the compiler's; times are roofline bounds that no step can beat.

Examples:
  luthier compile-check --config=configs/pod.py --topology=v5e:4x4 --model=llama3-8b
  luthier compile-check --config=configs/pod.py:lora --topology=v5e:2x4 --config.mesh.tensor=2
  luthier compile-check --config=configs/pod.py --topology='2*v5e:16x16' --config.mesh.data=2 --model=llama3-8b
  luthier compile-check --config=configs/pod.py --topology=v5e:4x4 --model=llama3-8b --search
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

from luthier.errors import LuthierError

HELP = "ask whether a recipe fits a TPU slice, without one"
DOTTED = ("overrides",)
EXIT_DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="the recipe: a file with get_config()")
    parser.add_argument("--config.KEY", metavar="VALUE", dest="_", help="change one value, such as mesh.tensor")
    parser.add_argument("--topology", required=True, metavar="T", help="the slice, such as v5e:4x4")
    parser.add_argument("--model", metavar="SHAPE", help="a known shape such as llama3-8b, not the recipe's model")
    parser.add_argument("--stage", type=int, default=0, metavar="N", help="which stage, counted from 0 (%(default)s)")
    parser.add_argument(
        "--weights_dtype", default="bfloat16", metavar="DTYPE", help="dtype of frozen weights (%(default)s)"
    )
    parser.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=6,
        metavar="N",
        help="list what fits of meshes, micro-batches and remat, best bound first; compiles N likeliest (%(const)s)",
    )
    parser.add_argument("--prices", metavar="FILE.json", help='dollars a chip and hour, such as {"v5e": 1.2}')
    parser.add_argument("--out", metavar="FILE.json", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for a TPU needs none, and must not take one

    from luthier import config

    recipe = config.load(args.config, args.overrides)
    if not 0 <= args.stage < len(recipe.stages):
        raise LuthierError(f"the recipe has {len(recipe.stages)} stages", where="--stage", mend="Count from 0")
    if args.search is not None and args.search < 1:
        raise LuthierError(f"nothing to compile with {args.search}", where="--search", mend="Use 1 or more")
    prices = _prices(args.prices) if args.prices else None
    about = {"shape": _shape(args, recipe), "topology": args.topology}
    about |= {"stage": args.stage, "weights_dtype": args.weights_dtype}
    code = (_search if args.search else _one)(args, recipe, about, prices)
    if "*" in args.topology:  # libtpu's teardown of several slices never ends
        sys.stdout.flush()
        os._exit(code)
    return code


def _one(args: argparse.Namespace, recipe, about, prices) -> int:
    """Compiles the recipe as it is."""
    from luthier.reporting import show
    from luthier.training import aot

    print(f"compiling for {args.topology}: seconds for millions of weights, minutes for billions", flush=True)
    check = aot.check(recipe, **about, prices=prices)
    show(_summary(check))
    if check.collectives:
        show(_network(check))
    for line in aot.advice(check):
        print(f"try     {line}")
    _write(args.out, aot.to_json(check))
    return 0 if check.fits else EXIT_DOES_NOT_FIT


def _search(args: argparse.Namespace, recipe, about, prices) -> int:
    """Compiles the recipe on several meshes; when that is interrupted, what is done is shown and kept."""
    from luthier.reporting import Progress, show
    from luthier.training import aot, search

    def compiled(one):
        changed = search.changed(recipe, args.stage, one.mesh, one.micro_batches, one.remat)
        return aot.check(changed, **about, prices=prices)

    found = search.candidates(recipe, **about)
    most, meshes = min(args.search, len(found)), len({tuple(one.mesh.values()) for one in found})
    print(f"{meshes} meshes divide this recipe over {args.topology}, {len(found)} ways with micro-batches and remat")
    print(f"compiling at most {most}: seconds each for millions of weights, minutes for billions", flush=True)
    done = []
    try:
        with Progress(most, "compiled", plain_seconds=0) as progress:
            progress.update(0)
            for number, pair in enumerate(search.in_order(found, compiled, most=most), 1):
                done.append(pair)
                _write(args.out, _ranking(args, search.ranked(done)))
                progress.log(_line(pair[1]))
                progress.update(number)
    finally:
        if done:
            show(_comparison(args, search.ranked(done)))
    best, check = search.ranked(done)[0]
    if check.fits:
        print(f"best    {search.words(best, args.stage)}")
    return 0 if check.fits else EXIT_DOES_NOT_FIT


def _write(path: str | None, record) -> None:
    from luthier.training.files import write_atomic

    if path:
        write_atomic(path, json.dumps(record, indent=1) + "\n")


def _prices(path: str) -> dict[str, float]:
    try:
        return {
            generation: float(dollars) for generation, dollars in json.loads(pathlib.Path(path).read_text()).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise LuthierError(f"not a table of prices: {error}", where=path, mend='Write it as {"v5e": 1.2}') from None


def _summary(check):
    from rich.table import Table

    table = Table("", check.topology, title="fits" if check.fits else "does not fit", title_style="bold")
    gib = lambda count: f"{count / 2**30:.2f} GiB"  # noqa: E731
    table.add_row("mesh", _mesh(check))
    table.add_row("tokens a step", f"{check.tokens:,}")
    if check.peak is None:
        table.add_row("memory a chip", f"the compiler refused: {check.refusal}")
    else:
        table.add_row("peak memory a chip", f"{gib(check.peak)} of {gib(check.capacity)}")
    for kind, count in check.held.items():
        table.add_row(f"  {kind}", gib(count))
    if check.peak is None:
        return table
    table.add_row("  at once beside them", gib(check.peak - check.arguments))
    table.add_row("FLOPs a chip and step", f"{check.flops:.3g}, of them useful {check.model_flops / check.flops:.0%}")
    for name, seconds in check.bounds.items():
        table.add_row(f"bound by {name}", f"{seconds:.3f} s")
    if check.collectives is None:
        table.add_row("bound by network", "unavailable: the program's text can't be had")
    if "*" in check.topology:
        table.add_row(
            "bound by data centre", "unavailable: what slices tell each other is no collective of the program"
        )
    rate = check.tokens / check.seconds
    table.add_row("no step is faster than", f"{check.seconds:.3f} s: {rate:,.0f} tokens/s, MFU {check.mfu:.0%}")
    table.add_row("1,000 steps cost at least", f"${check.dollars:,.2f} at ${check.price:.2f} a chip and hour")
    table.add_row("compiled in", f"{check.compile_seconds:.0f} s")
    return table


def _ranking(args: argparse.Namespace, done) -> dict:
    """What `--out` holds of a search: the compiled ones, the best first."""
    from luthier.training import aot

    rows = [aot.to_json(check) | {"estimate": dataclasses.asdict(one.estimate)} for one, check in done]
    return {"topology": args.topology, "results": rows}


def _comparison(args: argparse.Namespace, done):
    from rich.table import Table

    table = Table("mesh", title=f"{args.topology}, {done[0][1].tokens:,} tokens a step", title_style="bold")
    for heading in ("micro-batches", "remat", "peak GiB", "fits", "bound s", "by", "MFU", "received GB"):
        table.add_column(heading, justify="left" if heading in ("remat", "fits", "by") else "right")
    for _, check in done:
        table.add_row(*_cells(check))
    return table


def _cells(check) -> list[str]:
    start = [_mesh(check), str(check.micro_batches), check.remat]
    if check.peak is None:
        return [*start, "–", f"no: {check.refusal}"]
    received = "unavailable"
    if check.collectives is not None:
        received = f"{sum(one.wire_bytes for one in check.collectives) / 1e9:.3g}"
    by = max(check.bounds, key=check.bounds.get)
    fits = "yes" if check.fits else "no"
    return [*start, f"{check.peak / 2**30:.2f}", fits, f"{check.seconds:.3g}", by, f"{check.mfu:.0%}", received]


def _line(check) -> str:
    """One result, as it comes."""
    what = f"{_mesh(check)}, {check.micro_batches} micro-batch{'es' if check.micro_batches > 1 else ''}, {check.remat}"
    if not check.fits:
        return f"  {what}: does not fit, {check.refusal or f'{check.peak / 2**30:.2f} GiB'}"
    return f"  {what}: {check.peak / 2**30:.2f} GiB, bound {check.seconds:.3g} s"


def _mesh(check) -> str:
    return " × ".join(f"{axis}={size}" for axis, size in check.mesh.items() if size > 1) or "one chip"


def _network(check):
    from rich.table import Table

    table = Table("collective", "mesh axes", title="a chip's messages in one step")
    for heading in ("calls", "result GB", "received GB"):
        table.add_column(heading, justify="right")
    for one in check.collectives:
        sizes = (f"{one.output_bytes / 1e9:.3f}", f"{one.wire_bytes / 1e9:.3f}")
        table.add_row(one.kind, one.axes or "?", str(one.calls), *sizes)
    return table


def _shape(args: argparse.Namespace, recipe):
    from luthier import weights
    from luthier.models.presets import preset

    return preset(args.model) if args.model else weights.describe(recipe.model.source).config
