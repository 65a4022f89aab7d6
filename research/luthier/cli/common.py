"""What several subcommands share: a model to ask, records in, lines out."""

import argparse
import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from luthier.errors import LuthierError

MODEL = "`smollm2-135m`, a Hugging Face directory, a GGUF file, a workdir or a hub id"


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=required, metavar="M", help=MODEL)
    group.add_argument("--compute_dtype", default="float32", metavar="DTYPE", help="of activations (%(default)s)")
    group.add_argument("--attention", default="auto", metavar="NAME", help="attention backend (%(default)s)")
    group.add_argument("--template", metavar="FILE", help="Jinja chat template that replaces the model's own")


def add_tuners(parser: argparse.ArgumentParser) -> None:
    """For commands that ask a model directly; evaluations have options of these names."""
    group = parser.add_argument_group("tuners")
    group.add_argument("--soft_prompt", type=int, default=0, metavar="N", help="which, where there are several")
    group.add_argument("--without", action="append", default=[], metavar="NAME", help="leave one out, such as prompt")


def load_policy(args: argparse.Namespace):
    """The model that the arguments of `add_model` and `add_tuners` name (imports jax)."""
    from etils import epath

    from luthier.decoding import from_source
    from luthier.parallel import processes
    from luthier.parallel.compilation_cache import keep_programs

    processes.start()
    keep_programs()
    template = epath.Path(args.template).read_text() if args.template else None
    policy = from_source(args.model, compute_dtype=args.compute_dtype, attention=args.attention, template=template)
    known = [tuner.collection for tuner in policy.bound.tuners]
    for name in getattr(args, "without", ()):
        if name not in known:
            raise LuthierError(f"no tuner {name!r}", where="--without", mend=f"There are {', '.join(known) or 'none'}")
    return policy.asked(soft_prompt=getattr(args, "soft_prompt", 0), without=getattr(args, "without", ()))


def is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Any]:
    """A callback (done, in all) that shows progress on standard error, for jobs of more than one batch."""
    from luthier.reporting import Progress

    with Progress(total, description, quiet=not is_first_process()) as bar:
        yield lambda done, _: bar.update(done)


@contextlib.contextmanager
def places(where: Sequence[str]) -> Iterator[None]:
    """Errors about "prompt 3" or "pair 3" name the file and line it came from instead."""
    try:
        yield
    except LuthierError as error:
        found = re.fullmatch(r"(?:prompt|pair) (\d+)", str(error.where))
        if not found:
            raise
        raise LuthierError(error.what, where=where[int(found[1])], mend=error.mend) from None


def write_lines(path: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines in one move: the file is whole or as it was. Process 0 writes."""
    from etils import epath

    if not is_first_process():
        return
    target = epath.Path(path)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if os.path.exists(path) and not os.path.isfile(path):  # such as /dev/stdout, which a move would replace
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    if str(target.parent) not in ("", "."):
        target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(target)  # a full disk is found by a write, which knows no name
        raise
