"""Continues prompts, or talks.

The prompt comes from --prompt, from --input (a .jsonl file with a `prompt` a line, or any text
file as one prompt), or from standard input. One prompt gives plain text, several give JSON lines.

Examples:
  luthier generate --model=runs/quickstart --prompt="Compute 31 + 61 ="
  luthier generate --model=smollm2-135m --chat --temperature=0.7 --top_p=0.9
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.cli import common
from luthier.errors import LuthierError

HELP = "continue prompts, or chat"

# Name, type, default and help of `luthier.decoding.Sampling`, which would import jax; a test compares them.
SAMPLING = (
    ("max_new_tokens", int, 64, "most tokens made"),
    ("temperature", float, 0.0, "0 takes the most likely token (greedy)"),
    ("top_k", int, 0, "keep the k most likely tokens; 0 keeps all"),
    ("top_p", float, 1.0, "keep the most likely tokens up to this much probability"),
    ("min_p", float, 0.0, "keep tokens at least this many times as likely as the most likely"),
    ("seed", int, 0, "fixes the draws"),
    ("beams", int, 1, "width of a beam search; 1 is none"),
    ("length_penalty", float, 1.0, "a beam's text is scored by log-probability / length to this power"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_tuners(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--input", metavar="FILE", help=".jsonl with `prompt` (text or messages), or a text file")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write JSON lines there instead of standard output")
    parser.add_argument("--user", action="store_true", help="send text prompts as a user message (chat template)")
    parser.add_argument("--chat", action="store_true", help="talk: a line is a message, an empty one ends")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="prompts at once (%(default)s)")
    group = parser.add_argument_group("sampling")
    for name, kind, default, text in SAMPLING:
        group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=f"{text} (%(default)s)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")


def run(args: argparse.Namespace) -> int:
    if sum(map(bool, (args.prompt, args.input, args.chat))) > 1:
        raise LuthierError("give one of --prompt, --input and --chat")
    if args.chat:
        return _chat(args)
    prompts, where = _prompts(args)
    from luthier.decoding import generate

    sampling = _sampling(args)
    policy = common.load_policy(args)
    with common.places(where), common.progress("generate", len(prompts)) as report:
        made = generate(policy, prompts, sampling, batch_size=args.batch_size, progress=report)
    records = [
        {"prompt": prompt, "completion": m.text, "finish_reason": m.finish_reason} for prompt, m in zip(prompts, made)
    ]
    if args.output:
        common.write_lines(args.output, records)
    elif common.is_first_process():
        lines = [json.dumps(r, ensure_ascii=False) for r in records] if len(records) > 1 else [records[0]["completion"]]
        print("\n".join(lines))
    return 0


def _sampling(args: argparse.Namespace):
    from luthier.decoding import Sampling

    return Sampling(stop=tuple(args.stop), **{name: getattr(args, name) for name, *_ in SAMPLING})


def _prompts(args: argparse.Namespace) -> tuple[list, list[str]]:
    """Prompts and where each came from."""
    if args.prompt:
        places = ["--prompt"] * len(args.prompt)
        return [_asked({"prompt": text}, place, args.user) for text, place in zip(args.prompt, places)], places
    if args.input and args.input.endswith((".jsonl", ".json", ".parquet")):
        from luthier.data.sources import open_source

        source = open_source(args.input)
        places = [source.where(i) for i in range(len(source))]
        if not places:
            raise LuthierError("no records", where=args.input)
        return [_asked(source[i], place, args.user) for i, place in enumerate(places)], places
    if args.input:
        from etils import epath

        text = epath.Path(args.input).read_text()
    elif sys.stdin is None or sys.stdin.isatty():
        raise LuthierError("no prompt", mend="Give --prompt=TEXT, --input=FILE or --chat, or pipe text in")
    else:
        text = sys.stdin.read()
    where = args.input or "standard input"
    return [_asked({"prompt": text.removesuffix("\n")}, where, args.user)], [where]


def _asked(record: Mapping[str, Any], where: str, is_user: bool) -> str | Sequence[Mapping[str, Any]]:
    """The prompt of a record; of text, a message of the user's if that is asked for."""
    from luthier.data.records import Format, prompt_of

    if "prompt" not in record:
        raise LuthierError("no field 'prompt'", where=where, mend='Write {"prompt": …}')
    if is_user and isinstance(record["prompt"], str):
        record = {**record, "prompt": [{"role": "user", "content": record["prompt"]}]}
    return prompt_of(Format(), record, where)


def _chat(args: argparse.Namespace) -> int:
    import dataclasses

    from luthier.decoding import generate

    sampling = _sampling(args)
    policy = common.load_policy(args)
    policy.chat("--chat")
    messages, turn = [], 0
    ask = "› " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(ask)
        except EOFError:
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        with common.places(["this conversation"]):
            (answer,) = generate(policy, [messages], dataclasses.replace(sampling, seed=sampling.seed + turn))
        print(answer.text, flush=True)
        messages.append({"role": "assistant", "content": answer.text})
        turn += 1
