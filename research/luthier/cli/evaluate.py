"""Measures a model: the evaluations of a recipe, or one named on the command line.

Examples:
  luthier evaluate --model=runs/quickstart --config=configs/quickstart.py
  luthier evaluate --model=smollm2-135m --task=perplexity --task.data=text.jsonl
"""

import argparse
import ast
import dataclasses
import pathlib

from luthier.cli import common
from luthier.errors import LuthierError, near

HELP = "measure a model"
DOTTED = ("overrides", "task_options")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="run this recipe's evaluations and baselines")
    parser.add_argument("--config.KEY", metavar="VALUE", dest="_", help="change one value of the recipe")
    parser.add_argument("--task", metavar="NAME", help="run one: verifier, choices, perplexity or preferences")
    parser.add_argument("--task.KEY", metavar="VALUE", dest="__", help="its options, such as --task.data=FILE")
    parser.add_argument("--output", metavar="DIR", help="write results and records to DIR/evaluations")


def run(args: argparse.Namespace) -> int:
    from luthier import config

    if bool(args.config) == bool(args.task):
        raise LuthierError("give one of --config and --task")
    if args.config:
        recipe = config.load(args.config, args.overrides)
        specs = (*recipe.evaluations, *recipe.baselines)
        if not specs:
            raise LuthierError("the recipe has no evaluations", where=args.config, mend="Name one with --task=NAME")
    else:
        specs = (task(args.task, args.task_options),)
    from luthier import weights
    from luthier.evals import evaluate, write_result
    from luthier.reporting import result_table, show

    note = weights.describe(args.model).note
    results = evaluate(common.load_policy(args), specs, note=note)
    for spec in specs if args.output else ():
        write_result(args.output, "after", results[spec.label], config.thaw(spec))
    if common.is_first_process():
        show(result_table([dataclasses.asdict(result) for result in results.values()], note))
    return 0


def task(name: str, texts: list[str]):
    """The spec of an evaluation whose options are spelt `key=value`."""
    from luthier import config, methods

    known = [m.name for m in methods.METHODS if m.place == "evaluation"]
    if name not in known:
        raise LuthierError(f"unknown evaluation {name!r}", where="--task", mend=near(name, known))
    options = config.options_of(methods.find(name).target)
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise LuthierError("an option needs a value", where=f"--task.{key}", mend=f"Write --task.{key}=VALUE")
        if key not in options:
            raise LuthierError(f"unknown option {key!r}", where=f"--task.{key}", mend=near(key, options))
        values[key] = value if options[key].annotation.startswith("str") else _literal(value)
    if "data" not in values:
        raise LuthierError("an evaluation needs data", where="--task.data", mend="Give --task.data=FILE")
    return config.spec(name, **{"label": pathlib.PurePath(values["data"]).stem, **values})


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
