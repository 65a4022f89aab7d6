"""Parses the command line, runs a subcommand, and turns mistakes into one line and an exit code.

0 is success, 2 a mistake that the message tells how to mend, 75 a run that goes on when started again
(it stopped as asked, or one of its processes ended), 130 an interruption.
"""

import argparse
import errno
import importlib
import logging
import sys
from collections.abc import Sequence

from luthier import __version__
from luthier.errors import LuthierError, near

COMMANDS = ("train", "generate", "score", "evaluate", "export", "report", "sweep", "compile-check")

EXIT_MISTAKE, EXIT_AGAIN, EXIT_INTERRUPTED = 2, 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        args = parse(words)
        _log_to_stderr(logging.DEBUG if debug else logging.INFO)
        return args.run(args)
    except KeyboardInterrupt:
        print("luthier: interrupted", file=sys.stderr)
        _leave(EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except Exception as error:
        lost = _lost_another(error)
        message, code = (lost, EXIT_AGAIN) if lost else (mistake(error), EXIT_MISTAKE)
        if debug or message is None:
            _leave(1, error)
            raise
        print(f"luthier: error: {message}", file=sys.stderr)
        _leave(code)
        return code


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; `run` is the subcommand's, `overrides` its `--config.key=value`.

    Raises:
      LuthierError: an argument is unknown, missing or of the wrong type.
    """
    parser = _parser()
    dotted = {"--config.": [], "--task.": []}
    rest = []
    for word in words:
        prefix = next((p for p in dotted if word.startswith(p)), None)
        dotted[prefix].append(word.removeprefix(prefix)) if prefix else rest.append(word)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        raise LuthierError("unknown argument", where=unknown[0], mend=_nearest(unknown[0], args.options))
    for prefix, name in (("--config.", "overrides"), ("--task.", "task_options")):
        if dotted[prefix] and name not in args.dotted:
            raise LuthierError(f"`luthier {args.command}` takes no {prefix}KEY", where=f"{prefix}{dotted[prefix][0]}")
        setattr(args, name, dotted[prefix])
    return args


def mistake(error: BaseException) -> str | None:
    """One line for an error that the user can mend, or None for any other."""
    if isinstance(error, LuthierError):
        return str(error)
    chain = error
    while chain is not None:
        full = isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(chain):
            where = getattr(chain, "filename", None)
            mend = "Free some space and start the same command again; what was saved before is whole"
            return str(LuthierError("the disk is full", where=where, mend=mend))
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, OSError) and error.filename is not None:
        return str(LuthierError(error.strerror or str(error), where=error.filename))
    if isinstance(error, SyntaxError) and error.filename:
        return str(LuthierError(f"not Python: {error.msg}", where=f"{error.filename}:{error.lineno}"))
    return None


def _leave(code: int, error: Exception | None = None) -> None:
    """Ends one of several processes at once; returns if this is the only one."""
    if "jax" in sys.modules:
        from luthier.parallel import processes

        processes.leave(code, error)


def _lost_another(error: Exception) -> str | None:
    """One line if the error is the end of another process of the run."""
    if "jax" not in sys.modules:
        return None
    from luthier.parallel import processes

    found = processes.lost_another(error)
    mend = "Start all of them again; the run goes on from its last checkpoint"
    return found and str(LuthierError(f"another process of this run ended ({found})", mend=mend))


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as LuthierErrors, in one line."""

    def error(self, message: str):
        raise LuthierError(message, mend=f"See `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="luthier",
        description="Fine-tune language models, ask them, measure them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"luthier {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"luthier.cli.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        options = [option for action in command._actions for option in action.option_strings]
        command.set_defaults(run=module.run, options=options, dotted=getattr(module, "DOTTED", ()))
    return parser


def _nearest(word: str, options: Sequence[str]) -> str:
    return near(word.partition("=")[0], options) if word.startswith("-") else "Options are written --name=value"


class _Stderr(logging.Handler):
    """Looks standard error up at each line, so that lines go above a progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _log_to_stderr(level: int) -> None:
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("luthier")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
