"""Records of every format → tokens: what is trained is exactly what the format says."""

import json
import pathlib
import re

import chat_cases
import numpy as np
import pytest
from tiny_text import tiny_tokenizer

from luthier.data.records import FORMATS, REFUSED, Format, detect
from luthier.data.tokenize import BOUNDARY, UNTERMINATED, tokenize
from luthier.errors import LuthierError

U, A = chat_cases.user, chat_cases.assistant


def tokens_of(record, train_on="completion", tokenizer=None, **form):
    tokenizer = tokenizer or chat_cases.tokenizer("smollm2")
    example = Format(**form).told(record, "f:1").read(record, "f:1")
    template = chat_cases.template("smollm2")
    return tokenize([example], ["f:1"], tokenizer=tokenizer, template=template, train_on=train_on)[0]


def trained(tokens, tokenizer=None):
    tokenizer = tokenizer or chat_cases.tokenizer("smollm2")
    return tokenizer.decode(tokens.ids), tokenizer.decode(tokens.ids[tokens.weights > 0])


HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ONE = HEAD + "How many?<|im_end|>\n<|im_start|>assistant\ntwelve<|im_end|>\n"
FORMATS_SEEN = [
    ("text", {"text": "The sky is blue."}, {}, "The sky is blue.<|im_end|>", "The sky is blue.<|im_end|>"),
    ("text", {"text": "The sky.<|im_end|>"}, {}, "The sky.<|im_end|>", None),
    (
        "prompt_completion",
        {"prompt": "The sky is", "completion": " blue."},
        {},
        "The sky is blue.<|im_end|>",
        " blue.<|im_end|>",
    ),
    (
        "prompt_completion",
        {"prompt": "The sky is", "completion": " blue.<|im_end|>"},
        {},
        "The sky is blue.<|im_end|>",
        " blue.<|im_end|>",
    ),
    ("prompt_completion", {"prompt": "", "completion": "The sky"}, {}, "The sky<|im_end|>", None),
    ("prompt_completion", {"prompt": [U("How many?")], "completion": [A("twelve")]}, {}, ONE, "twelve<|im_end|>"),
    ("prompt_completion", {"prompt": [U("How many?")], "completion": "twelve"}, {}, ONE, "twelve<|im_end|>"),
    ("messages", {"messages": [U("How many?"), A("twelve")], "label": None}, {}, ONE, "twelve<|im_end|>"),
    (
        "messages",
        {"messages": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "twelve"}]},
        {},
        ONE,
        "twelve<|im_end|>",
    ),
    ("messages", {"messages": [U([{"type": "text", "text": "x"}]), A("twelve")]}, {}, None, None),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "twelve"}]},
        {},
        ONE,
        "twelve<|im_end|>",
    ),
    (
        "alpaca",
        {"instruction": "How", "input": "many?", "output": "twelve"},
        {},
        ONE.replace("How many?", "How\nmany?"),
        "twelve<|im_end|>",
    ),
    ("alpaca", {"instruction": "How many?", "input": "", "output": "twelve"}, {}, ONE, "twelve<|im_end|>"),
    (
        "alpaca",
        {"instruction": "How many?", "output": "twelve", "system": "Sir.", "history": [["Hi", "Hello."]]},
        {},
        "<|im_start|>system\nSir.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\ntwelve<|im_end|>\n",
        "twelve<|im_end|>",
    ),
    (
        "inputs_targets",
        {"inputs": "The sky is", "targets": " blue."},
        {},
        "The sky is blue.<|im_end|>",
        " blue.<|im_end|>",
    ),
    (
        "prompt_completion",
        {"question": "The sky is", "answer": " blue.", "prompt": 3},
        {"columns": {"prompt": "question", "completion": "answer"}},
        "The sky is blue.<|im_end|>",
        " blue.<|im_end|>",
    ),
    (
        "messages",
        {"dialog": [{"who": "me", "said": "How many?"}, {"who": "bot", "said": "twelve"}]},
        {
            "columns": {"messages": "dialog", "role": "who", "content": "said"},
            "roles": {"me": "user", "bot": "assistant"},
        },
        ONE,
        "twelve<|im_end|>",
    ),
]


@pytest.mark.parametrize("name,record,form,text,target", FORMATS_SEEN)
def test_format_is_told_and_read(name, record, form, text, target):
    assert Format(**form).told(record, "f:1").name == name
    if text is None:
        return
    found = tokens_of(record, **form)
    first = chat_cases.tokenizer("smollm2").decode(found.ids[:1])
    assert trained(found) == (text, text[len(first) :] if target is None or target == text else target)
    assert tokens_of(record, **{**form, "name": name}).ids.tolist() == found.ids.tolist()


def test_every_format_is_seen():
    assert {name for name, *_ in FORMATS_SEEN} | {"tokens"} == set(FORMATS)


PREFERENCE = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    ({"chosen": [U("a"), A("b")], "rejected": [U("a"), A("c")]}, "preference"),
    ({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, "preference"),
    ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
    ({"prompt": "a", "completion": "b", "label": True}, "unpaired_preference"),
    ({"instruction": "a", "input": "", "output": "b", "kto_tag": True}, "unpaired_preference"),
    ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise"),
    ({"prompt": "a"}, "prompt_only"),
]


@pytest.mark.parametrize("record,name", PREFERENCE)
def test_formats_of_other_losses_are_recognised_and_refused(record, name):
    assert detect(record) == name and name in REFUSED
    with pytest.raises(LuthierError, match=f"f:1: {name} records: .*SFT trains on text"):
        Format().told(record, "f:1")


IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
    "record,train_on,weights",
    [
        ({"input_ids": IDS}, "completion", [0, 1, 1, 1]),
        ({"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}, "completion", [0, 0, 1, 1]),
        ({"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}, "all", [0, 1, 1, 1]),
        ({"input_ids": IDS, "assistant_masks": [0, 1, 0, 1]}, "assistant", [0, 1, 0, 1]),
        ({"input_ids": IDS, "labels": [-100, -100, 7, 8]}, "completion", [0, 0, 1, 1]),
        ({"input_ids": IDS, "labels": IDS}, "completion", [0, 1, 1, 1]),
        ({"inputs": IDS[:1], "targets": IDS[1:]}, "completion", [0, 1, 1, 1]),
    ],
)
def test_ids_made_elsewhere(record, train_on, weights):
    found = tokens_of(record, train_on)
    assert found.ids.tolist() == IDS and found.weights.tolist() == weights


@pytest.mark.parametrize("adds,bos,end", [("", None, 0), ("bos", "<s>", 0), ("bos+eos", "<s>", 1)])
@pytest.mark.parametrize("record", [{"text": "The sky"}, {"prompt": "The sky", "completion": " is blue"}])
def test_eos_once_and_bos_once(adds, bos, end, record):
    tokenizer = tiny_tokenizer(adds=adds, eos_token="</s>", **({"bos_token": bos} if bos else {}))
    for spelled in (record, {k: v + "</s>" * (k != "prompt") for k, v in record.items()}):
        for front in {"", bos or ""}:
            key = next(iter(spelled))
            found = tokens_of({**spelled, key: front + spelled[key]}, tokenizer=tokenizer)
            assert found.ids.tolist().count(tokenizer.eos_id) == 1 and found.ids[-1] == tokenizer.eos_id
            assert found.weights[-1] == 1 and found.weights[0] == 0
            assert found.ids.tolist().count(tokenizer.bos_id or -1) == (1 if bos else 0)
            if "completion" in record:
                assert trained(found, tokenizer)[1] == " is blue</s>"


def test_eos_is_decided_for_each_record():
    rows = [{"text": "The sky</s>"}, {"text": "is blue"}]
    tokenizer = tiny_tokenizer(eos_token="</s>")
    assert [tokens_of(r, tokenizer=tokenizer).ids[-1] for r in rows] == [tokenizer.eos_id] * 2


def test_a_merge_over_the_boundary_is_a_target_and_flagged():
    tokenizer = chat_cases.tokenizer("smollm2")
    whole = tokenizer.encode("The answer is")
    first = tokenizer.decode(whole[:1])
    assert len(first) > 1  # "Th" or "The": the split falls inside it
    found = tokens_of({"prompt": first[:1], "completion": "The answer is"[1:]})
    assert found.flags & BOUNDARY and found.ids[:-1].tolist() == whole
    clean = tokens_of({"prompt": "The answer", "completion": " is"})
    assert not clean.flags & (BOUNDARY | UNTERMINATED)
    # TRL's rule: the completion begins where the two token sequences part.
    prompt = tokenizer.encode("The answer i")
    found = tokens_of({"prompt": "The answer i", "completion": "s blue"})
    shared = next(i for i, (a, b) in enumerate(zip(prompt, found.ids)) if a != b)
    assert np.flatnonzero(found.weights)[0] == shared


def test_roles_name_whose_words_they_are():
    from luthier.data.tokenize import ROLES

    found = tokens_of({"messages": [U("How many?"), A("twelve")]})
    tokenizer = chat_cases.tokenizer("smollm2")
    words = {r: tokenizer.decode(found.ids[found.roles == ROLES.index(r)]) for r in ("user", "assistant")}
    assert words == {"user": "How many?", "assistant": "twelve<|im_end|>"}


CHAT = {"messages": [U("a"), A("b")]}
BAD = [
    (
        {"prompt": "a", "answer": "b"},
        {"name": "prompt_completion"},
        r"f:1: no field 'completion' in a record of .*; it has 'prompt', 'answer'\. Add it",
    ),
    (
        {"question": "a", "answer": "b"},
        {},
        r"f:1: cannot tell the format from the keys 'question', 'answer'\. Map them",
    ),
    (
        {"question": "a"},
        {"columns": {"prompt": "question", "completion": "answer"}, "name": "prompt_completion"},
        r"no field 'answer'",
    ),
    ({"prompt": "a", "completion": ""}, {}, r"f:1: 'completion' is empty"),
    ({"prompt": "a", "completion": " \n"}, {}, r"f:1: 'completion' is empty"),
    ({"prompt": "a", "completion": []}, {"name": "prompt_completion"}, r"f:1: 'completion' is empty"),
    ({"prompt": 3, "completion": "b"}, {}, r"f:1: 'prompt' is not a list of messages"),
    ({"prompt": "a", "completion": 4}, {}, r"f:1: 'completion' is (not|a number)"),
    ({"text": ""}, {}, r"f:1: 'text' is empty"),
    ({"text": 3}, {}, r"f:1: 'text' is a number, expected text"),
    ({"messages": []}, {}, r"f:1: no assistant message in 'messages'"),
    ({"messages": [U("a")]}, {}, r"f:1: no assistant message in 'messages'"),
    ({"messages": [U("a"), A("")]}, {}, r"f:1: an assistant message is empty"),
    ({"messages": ["a"]}, {}, r"f:1: messages\[0\] is text, expected an object with role and content"),
    (
        {"messages": [{"role": "alien", "content": "a"}]},
        {},
        r"f:1: messages\[0\] has the unknown role 'alien'\. Map it with data\.roles",
    ),
    ({"messages": [{"content": "a"}]}, {}, r"f:1: messages\[0\] has no role"),
    ({"messages": [{"role": "user"}]}, {}, r"f:1: messages\[0\] has no content"),
    ({"messages": [{"role": "user", "content": 3}]}, {}, r"f:1: the content of messages\[0\] is a number"),
    ({"messages": [U([{"type": "image", "url": "x"}]), A("b")]}, {}, r"f:1: messages\[0\] has parts that are not text"),
    ({**CHAT, "tools": "[{"}, {}, r"f:1: 'tools' is broken JSON"),
    ({**CHAT, "chat_template_kwargs": 1}, {}, r"f:1: 'chat_template_kwargs' is a number"),
    (
        {"instruction": "a", "output": "b", "history": ["c"]},
        {},
        r"f:1: 'history' is not a list of \[question, answer\] pairs",
    ),
    ({"input_ids": "abc"}, {}, r"f:1: 'input_ids' is not a list of integers"),
    ({"input_ids": [1, 2], "completion_mask": [1]}, {}, r"f:1: 'completion_mask' has 1 entries and 'input_ids' 2"),
    ({"input_ids": [1, 2], "labels": [2, 3]}, {}, r"f:1: 'labels' differ from 'input_ids'"),
    ({"input_ids": [1, 2], "completion_mask": [0, 0]}, {}, r"f:1: no token of this example is a target"),
    ({"input_ids": [1, 2], "completion_mask": [1, 0]}, {}, r"f:1: no token of this example is a target"),
    ({"input_ids": [1, 99999]}, {}, r"f:1: token id 99999 at position 1 is outside the vocabulary"),
    (
        {"input_ids": [1, 2], "assistant_masks": [0, 1]},
        {},
        r"f:1: train_on='completion' .* the record has assistant_masks",
    ),
    ({"text": "a"}, {"name": "txet"}, r"data\.format: unknown format 'txet'\. Did you mean 'text'\?"),
    ({"text": "a"}, {"roles": {"x": "user"}}, r"data\.roles: text records have no roles to rename"),
    (CHAT, {"roles": {"x": "usr"}}, r"data\.roles: unknown role 'usr'\. Did you mean 'user'"),
]


@pytest.mark.parametrize("record,form,message", BAD)
def test_bad_records_are_one_clear_line(record, form, message):
    with pytest.raises(LuthierError) as error:
        tokens_of(json.loads(json.dumps(record)), **form)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record,train_on,message",
    [
        ({"text": "The sky"}, "assistant", r"f:1: text records have no assistant turns"),
        ({"text": "The sky"}, "everything", r"data\.train_on: unknown value 'everything'"),
        (
            {"input_ids": [1, 2], "completion_mask": [0, 1]},
            "assistant",
            r"needs assistant_masks, the record has completion_mask",
        ),
    ],
)
def test_train_on_that_does_not_fit(record, train_on, message):
    with pytest.raises(LuthierError, match=message):
        tokens_of(record, train_on)


def test_a_conversation_needs_a_template():
    example = Format().told(CHAT, "f:1").read(CHAT, "f:1")
    with pytest.raises(LuthierError, match=r"f:1: a conversation needs a chat template and the model has none\. Name"):
        tokenize([example], ["f:1"], tokenizer=tiny_tokenizer(), template=None, train_on="completion")


def test_the_lines_of_the_documentation_are_read_as_it_says():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "data.md").read_text()
    lines = re.findall(r"^\| `(\w+)` \| `({.*})` \|$", page, re.MULTILINE)
    assert {name for name, _ in lines} == set(FORMATS)
    for name, line in lines:
        record = json.loads(line)
        assert detect(record) == name
        train_on = "assistant" if "assistant_masks" in record else "completion"
        assert tokens_of(record, train_on).weights.any()
    assert all(name in page for name in REFUSED)
