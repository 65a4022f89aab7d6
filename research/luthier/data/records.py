"""Records as users have them → examples: text in segments, a conversation, or token ids.

A record is a dict (one line of JSON, one row of Parquet). Its format is told from its keys by
TRL's rules, or named. docs/data.md has a line of each.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from luthier.errors import LuthierError, near

ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    "function_response": "tool",
}
SYSTEM = ("system", "developer")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of plain text and whose it is: `text`, `prompt` or `completion`."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """Segments written one after the other, nothing between them; the last one ends with EOS."""

    segments: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation; the messages after the first `prompt_turns` are its completion.

    Where assistant turns are trained, those from message `trained_from` on are.
    """

    messages: tuple[dict, ...]
    prompt_turns: int
    tools: tuple[dict, ...] | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained_from: int = 0


@dataclasses.dataclass(frozen=True)
class Ids:
    """Token ids made elsewhere, with 0/1 masks by the name of what they mark."""

    ids: np.ndarray
    masks: Mapping[str, np.ndarray]


Example = Text | Chat | Ids


@dataclasses.dataclass(frozen=True)
class Format:
    """How one source's records are read.

    Attributes:
      name: a key of `FORMATS`, or `auto`.
      columns: {our field: their column}; where given, only these are read. `role` and `content`
        name the fields of a message.
      roles: {their role: our role}, on top of the usual names.
    """

    name: str = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def told(self, record: Mapping, where: str) -> "Format":
        """This format with its name told from the keys of a record, if it is `auto`."""
        name = detect(self.fields(record), where) if self.name == "auto" else self.name
        if name in REFUSED:
            others = 'Take a preference objective, such as spec("dpo"); ' if name in PREFERENCES else ""
            raise LuthierError(
                f"{name} records: {REFUSED[name]}", where=where, mend=f"{others}SFT trains on {', '.join(FORMATS)}"
            )
        if name not in FORMATS:
            raise LuthierError(f"unknown format {name!r}", where="data.format", mend=near(name, ["auto", *FORMATS]))
        if self.roles and name in ("text", "tokens"):
            raise LuthierError(f"{name} records have no roles to rename", where="data.roles", mend="Remove it")
        return self.named(name)

    def named(self, name: str) -> "Format":
        """This format by its name, its roles checked."""
        for role in self.roles.values():
            if role not in ROLES:
                raise LuthierError(f"unknown role {role!r}", where="data.roles", mend=near(role, ROLES))
        return dataclasses.replace(self, name=name)

    def read(self, record: Mapping, where: str) -> Example:
        """The record as an example; `where` (file:line) begins the message of every error."""
        fields = self.fields(record)
        parser, needed = FORMATS[self.name]
        for key in needed:
            if key not in fields:
                theirs = self.columns.get(key, key)
                raise LuthierError(
                    f"no field {theirs!r} in a record of format {self.name!r}; it has {', '.join(map(repr, record))}",
                    where=where,
                    mend=f"Add it, or map one with data.columns={{'{key}': …}}",
                )
        return parser(self, fields, where)

    def fields(self, record: Mapping) -> dict:
        """The record's fields by our names; those that are null are not there."""
        if not self.columns:
            return {key: value for key, value in record.items() if value is not None}
        nested = ("role", "content")
        taken = {ours: record.get(theirs) for ours, theirs in self.columns.items() if ours not in nested}
        return {ours: value for ours, value in taken.items() if value is not None}

    def messages(self, value: Any, where: str, field: str) -> tuple[dict, ...]:
        """Messages with `role` and `content`, from any naming of both."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise LuthierError(f"{field!r} is not a list of messages", where=where)
        return tuple(self._message(item, where, f"{field}[{i}]") for i, item in enumerate(value))

    def _message(self, item: Any, where: str, field: str) -> dict:
        if not isinstance(item, Mapping):
            raise LuthierError(f"{field} is {kind_of(item)}, expected an object with role and content", where=where)
        message = {key: value for key, value in item.items() if value is not None}
        for ours, theirs in (
            ("role", self.columns.get("role", "from")),
            ("content", self.columns.get("content", "value")),
        ):
            if theirs in message and ours not in message:
                message[ours] = message.pop(theirs)
        role = message.get("role")
        role = self.roles.get(role, ROLE_ALIASES.get(role, role))
        if role not in ROLES:
            raise LuthierError(
                f"{field} has {'no role' if role is None else f'the unknown role {role!r}'}",
                where=where,
                mend=f"Map it with data.roles, as in roles={{{role!r}: 'user'}}"
                if role
                else f"It has the keys {', '.join(message)}",
            )
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise LuthierError(
                f"{field} has no content", where=where, mend="Add it, or name its key with data.columns={'content': …}"
            )
        if isinstance(content, Sequence) and not isinstance(content, str):
            if any(not isinstance(part, Mapping) or part.get("type", "text") != "text" for part in content):
                raise LuthierError(
                    f"{field} has parts that are not text", where=where, mend="Only text can be trained on"
                )
        elif content is not None and not isinstance(content, str):
            raise LuthierError(f"the content of {field} is {kind_of(content)}, expected text", where=where)
        return {
            "role": role,
            "content": content if content is not None else "",
            **{k: v for k, v in message.items() if k not in ("role", "content")},
        }


def detect(fields: Mapping, where: str = "") -> str:
    """The name of a record's format, told from its keys (and `prompt` text from messages)."""
    has = fields.__contains__
    if has("input_ids"):
        return "tokens"
    if has("kto_tag") or (has("prompt") and has("completion") and has("label")):
        return "unpaired_preference"
    if has("chosen") or has("rejected") or (has("real") and has("generated")):
        return "preference"
    if has("completions") and has("labels"):
        return "stepwise"
    if has("completions") and (has("scores") or has("instruction")):
        return "ranked_preference"
    if has("prompt"):
        return "prompt_completion" if has("completion") else "prompt_only"
    for key, name in (("messages", "messages"), ("conversations", "sharegpt"), ("text", "text")):
        if has(key):
            return name
    if has("instruction") and has("output"):
        return "alpaca"
    if has("inputs") and has("targets"):
        return "inputs_targets"
    raise LuthierError(
        f"cannot tell the format from the keys {', '.join(map(repr, fields)) or '(none)'}",
        where=where,
        mend="Map them, as in data.columns={'prompt': 'question', 'completion': 'answer'}",
    )


def _text(form: Format, fields: Mapping, where: str) -> Example:
    return Text((Segment("text", string_of(fields, "text", where)),))


def _prompt_completion(form: Format, fields: Mapping, where: str) -> Example:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        refuse_system(fields, where)
        text = string_of(fields, "completion", where)
        return Text((Segment("prompt", prompt), Segment("completion", text)))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    before, after = form.messages(prompt, where, "prompt"), form.messages(completion, where, "completion")
    if not after:
        raise LuthierError("'completion' is empty", where=where, mend="Delete the record or give it a completion")
    return chat_of(with_system(before, form, fields, where), after, fields, where)


def _conversation(form: Format, fields: Mapping, where: str, field: str = "messages") -> Example:
    messages = with_system(form.messages(fields[field], where, field), form, fields, where)
    if not any(m["role"] == "assistant" for m in messages):
        raise LuthierError(
            f"no assistant message in {field!r}", where=where, mend="Name it with data.roles, or delete the record"
        )
    return chat_of(messages[:-1], messages[-1:], fields, where)


def with_system(messages: tuple[dict, ...], form: Format, fields: Mapping, where: str) -> tuple[dict, ...]:
    """The record's `system` and the messages, unless these begin with a system message of their own."""
    if not fields.get("system") or (messages and messages[0]["role"] in SYSTEM):
        return messages
    return (*form.messages([{"role": "system", "content": fields["system"]}], where, "system"), *messages)


def prompt_of(form: Format, fields: Mapping, where: str) -> str | tuple[dict, ...]:
    """The `prompt` of a record that is to be answered: text, or messages with the record's `system`."""
    prompt = fields["prompt"]
    if isinstance(prompt, str):
        refuse_system(fields, where)
        return prompt
    return with_system(form.messages(prompt, where, "prompt"), form, fields, where)


def refuse_system(fields: Mapping, where: str) -> None:
    """Plain text has no place for a `system` field.

    Raises:
      LuthierError: if the record has one.
    """
    if fields.get("system"):
        raise LuthierError(
            "'system' stands beside a prompt of plain text",
            where=where,
            mend='Write the prompt as messages, [{"role": "user", "content": …}], or name the fields in data.columns',
        )


def _sharegpt(form: Format, fields: Mapping, where: str) -> Example:
    return _conversation(form, fields, where, "conversations")


def _alpaca(form: Format, fields: Mapping, where: str) -> Example:
    output = {"role": "assistant", "content": string_of(fields, "output", where)}
    return chat_of(alpaca_prompt(form, fields, where), form.messages([output], where, "output"), fields, where)


def alpaca_prompt(form: Format, fields: Mapping, where: str) -> tuple[dict, ...]:
    """What comes before the output of an Alpaca record."""
    instruction, extra = string_of(fields, "instruction", where), fields.get("input", "")
    history = fields.get("history", ())
    if any(not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 for pair in history):
        raise LuthierError("'history' is not a list of [question, answer] pairs", where=where)
    earlier = [m for q, a in history for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    question = {"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction}
    return with_system(form.messages([*earlier, question], where, "messages"), form, fields, where)


def chat_of(before: tuple[dict, ...], after: tuple[dict, ...], fields: Mapping, where: str) -> Chat:
    """The conversation of a prompt and a completion; tools and the template's variables come from the record."""
    for message in (*before, *after):
        empty = not message.get("content") if isinstance(message["content"], list) else not message["content"].strip()
        if message["role"] == "assistant" and empty and not message.get("tool_calls"):
            raise LuthierError(
                "an assistant message is empty", where=where, mend="Delete the record or give it an answer"
            )
    tools = fields.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise LuthierError(f"'tools' is broken JSON: {error.msg}", where=where) from None
    kwargs = fields.get("chat_template_kwargs", {})
    if not isinstance(kwargs, Mapping):
        raise LuthierError(f"'chat_template_kwargs' is {kind_of(kwargs)}, expected an object", where=where)
    for key in ("messages", "tools", "add_generation_prompt"):
        if key in kwargs:
            raise LuthierError(f"'chat_template_kwargs' may not set {key!r}", where=where)
    return Chat((*before, *after), len(before), tuple(tools) if tools else None, kwargs)


def _tokens(form: Format, fields: Mapping, where: str) -> Example:
    ids = _array(fields, "input_ids", where)
    masks = {
        key: _array(fields, key, where) for key in ("completion_mask", "assistant_masks", "labels") if key in fields
    }
    for key, mask in masks.items():
        if len(mask) != len(ids):
            raise LuthierError(f"{key!r} has {len(mask)} entries and 'input_ids' {len(ids)}", where=where)
    if "labels" in masks:
        labels = masks["labels"]
        if np.any((labels != -100) & (labels != ids)):
            raise LuthierError(
                "'labels' differ from 'input_ids'", where=where, mend="Labels repeat the ids, unshifted, or are -100"
            )
        masks["labels"] = (labels != -100).astype(np.int32)
    return Ids(ids, masks)


def _inputs_targets(form: Format, fields: Mapping, where: str) -> Example:
    if isinstance(fields["inputs"], str):
        return _prompt_completion(form, {**fields, "prompt": fields["inputs"], "completion": fields["targets"]}, where)
    inputs, targets = _array(fields, "inputs", where), _array(fields, "targets", where)
    mask = np.repeat(np.int32([0, 1]), [len(inputs), len(targets)])
    return Ids(np.concatenate([inputs, targets]), {"completion_mask": mask})


# Each format's reader and the fields it cannot do without.
FORMATS: Mapping[str, tuple[Callable[[Format, Mapping, str], Example], tuple[str, ...]]] = {
    "text": (_text, ("text",)),
    "messages": (_conversation, ("messages",)),
    "prompt_completion": (_prompt_completion, ("prompt", "completion")),
    "tokens": (_tokens, ("input_ids",)),
    "alpaca": (_alpaca, ("instruction", "output")),
    "sharegpt": (_sharegpt, ("conversations",)),
    "inputs_targets": (_inputs_targets, ("inputs", "targets")),
}
REFUSED = {
    "prompt_only": "there is no completion to learn",
    "preference": "they need a preference loss (chosen against rejected)",
    "unpaired_preference": "they need a preference loss (a label for each completion)",
    "ranked_preference": "they need a preference loss (a score for each completion)",
    "stepwise": "they need a process-reward loss (a label for each step)",
}
PREFERENCES = ("preference", "unpaired_preference", "ranked_preference")  # read by `luthier.data.groups`


def string_of(fields: Mapping, key: str, where: str) -> str:
    """The text of a field, which is not blank."""
    value = fields[key]
    if not isinstance(value, str):
        raise LuthierError(f"{key!r} is {kind_of(value)}, expected text", where=where)
    if not value.strip():
        raise LuthierError(f"{key!r} is empty", where=where, mend=f"Delete the record or give it a {key}")
    return value


def _array(fields: Mapping, key: str, where: str) -> np.ndarray:
    try:
        array = np.asarray(fields[key])
    except ValueError:
        array = np.zeros((0, 0))
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iub":
        raise LuthierError(f"{key!r} is not a list of integers", where=where)
    return array.astype(np.int32)


def kind_of(value: Any) -> str:
    """What a value of JSON is called in errors."""
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), type(value).__name__)
