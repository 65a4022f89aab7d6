"""Writes report.html into a workdir, from whatever its run has left there so far.

Example:
  luthier report runs/quickstart
"""

import argparse

HELP = "write the HTML report of a workdir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", help="what `luthier train --workdir` wrote; may be gs://")


def run(args: argparse.Namespace) -> int:
    from luthier.reporting import write_report

    print(write_report(args.workdir))
    return 0
