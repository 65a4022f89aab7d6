"""Runs the recipe at every point of its get_sweep(), or goes on with a sweep that was stopped.

Examples:
  luthier sweep --config=configs/quickstart.py --workdir=runs/rates
  luthier sweep --config=configs/quickstart.py --workdir=runs/rates --dry_run | parallel -j 4
  luthier sweep --config=configs/quickstart.py --workdir=/shared/rates --prefix='sbatch launch/slurm.sh'
"""

import argparse
import json
import shlex
import sys

HELP = "run a recipe at many points, and tabulate them"
DOTTED = ("overrides",)
EXIT_SOME_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="a file with get_config, get_sweep")
    parser.add_argument("--config.KEY", metavar="VALUE", dest="_", help="change one value at every point")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a folder for every point goes in here")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="points at a time (%(default)s)")
    parser.add_argument("--prefix", default="", metavar="WORDS", help="a launcher to hand each command to")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run none")
    parser.add_argument("--collect", action="store_true", help="only tabulate what there is")


def run(args: argparse.Namespace) -> int:
    from luthier.training import sweep
    from luthier.training.files import write_atomic
    from luthier.training.signals import EXIT_PREEMPTED

    points = sweep.points(args.config, args.workdir, args.overrides, shlex.split(args.prefix))
    if args.dry_run:
        for point in points:
            print(point)
        return 0
    codes = None if args.collect else sweep.run(points, args.workdir, jobs=args.jobs)
    rows = sweep.collect(points, args.workdir)
    write_atomic(f"{args.workdir}/sweep.json", json.dumps(rows, indent=1) + "\n")
    _show(rows)
    if codes is None:
        return 0
    if len(codes) < len(points) or EXIT_PREEMPTED in codes.values():
        print("luthier: the sweep stopped as asked; the same command goes on from there", file=sys.stderr)
        return EXIT_PREEMPTED
    return EXIT_SOME_FAILED if any(codes.values()) else 0


def _show(rows) -> None:
    from rich.table import Table

    from luthier.reporting import show

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns[:1])
    for key in columns[1:]:
        table.add_column(key.rpartition(".")[2], justify="right")
    for row in rows:
        cells = (row.get(key, "–") for key in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    show(table)
