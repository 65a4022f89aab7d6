"""Compiles a recipe's real train step for a TPU slice that is not here, and says whether it fits.

Memory and collectives are the compiler's; times are roofline bounds that no step can beat.

Examples:
  luthier compile-check --config=configs/pod.py --topology=v5e:4x4 --model=llama3-8b
  luthier compile-check --config=configs/pod.py:lora --topology=v5e:2x4 --config.mesh.tensor=2
  luthier compile-check --config=configs/pod.py --topology='2*v5e:16x16' --config.mesh.data=2 --model=llama3-8b
"""

import argparse
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
    parser.add_argument("--prices", metavar="FILE.json", help='dollars a chip and hour, such as {"v5e": 1.2}')
    parser.add_argument("--out", metavar="FILE.json", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for a TPU needs none, and must not take one

    from luthier import config
    from luthier.reporting import show
    from luthier.training import aot
    from luthier.training.files import write_atomic

    recipe = config.load(args.config, args.overrides)
    if not 0 <= args.stage < len(recipe.stages):
        raise LuthierError(f"the recipe has {len(recipe.stages)} stages", where="--stage", mend="Count from 0")
    prices = _prices(args.prices) if args.prices else None
    shape = _shape(args, recipe)
    print(f"compiling for {args.topology}: seconds for millions of weights, minutes for billions", flush=True)
    check = aot.check(recipe, shape, args.topology, stage=args.stage, weights_dtype=args.weights_dtype, prices=prices)
    show(_summary(check))
    if check.collectives:
        show(_network(check))
    for line in aot.advice(check):
        print(f"try     {line}")
    if args.out:
        write_atomic(args.out, json.dumps(aot.to_json(check), indent=1) + "\n")
    code = 0 if check.fits else EXIT_DOES_NOT_FIT
    if "*" in args.topology:  # libtpu's teardown of several slices never ends
        sys.stdout.flush()
        os._exit(code)
    return code


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
    table.add_row("mesh", " × ".join(f"{axis}={size}" for axis, size in check.mesh.items() if size > 1) or "one chip")
    table.add_row("tokens a step", f"{check.tokens:,}")
    if check.peak is None:
        table.add_row("memory a chip", f"the compiler refused: {check.refusal}")
        return table
    table.add_row("peak memory a chip", f"{gib(check.peak)} of {gib(check.capacity)}")
    table.add_row("  weights, state, batch", gib(check.arguments))
    table.add_row("  temporaries", gib(check.temporaries))
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
