"""Chat templates against transformers and TRL (tests/goldens/make_chat.py), and what they may not do."""

import datetime
import json

import chat_cases
import numpy as np
import pytest

from luthier.data.chat import ChatTemplate
from luthier.data.records import Chat
from luthier.data.tokenize import tokenize
from luthier.errors import LuthierError

GOLDEN = json.loads((chat_cases.FOLDER / "rendered.json").read_text())
CASES = [(family, name) for family in GOLDEN for name in GOLDEN[family]]


def tokens_of(family, messages, train_on, prompt_turns=None):
    turns = len(messages) - 1 if prompt_turns is None else prompt_turns
    template, tokenizer = chat_cases.template(family), chat_cases.tokenizer(family)
    return tokenize([Chat(tuple(messages), turns)], ["f:1"], tokenizer=tokenizer, template=template, train_on=train_on)[
        0
    ]


def trained_texts(family, tokens):
    """The runs of targets, decoded."""
    tokenizer = chat_cases.tokenizer(family)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.weights > 0, [0]])))
    return [tokenizer.decode(tokens.ids[a:b]) for a, b in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize("family,name", CASES)
def test_renders_as_transformers_does(family, name):
    template = chat_cases.template(family)
    for options, expected in zip(chat_cases.OPTIONS, GOLDEN[family][name]["texts"]):
        if expected is None:
            with pytest.raises(LuthierError, match=f"{family}.jinja: the chat template refuses"):
                template.render(chat_cases.CONVERSATIONS[name], **options)
        else:
            assert template.render(chat_cases.CONVERSATIONS[name], **options) == expected


@pytest.mark.parametrize("family,name", [c for c in CASES if GOLDEN[c[0]][c[1]]["completion"]])
def test_completion_is_trls_less_the_white_space_after_the_turn(family, name):
    expected = GOLDEN[family][name]["completion"]
    found = tokens_of(family, chat_cases.CONVERSATIONS[name], "completion")
    tokenizer = chat_cases.tokenizer(family)
    assert found.ids.tolist() == expected["input_ids"]
    theirs = np.asarray(expected["completion_mask"])
    differ = np.flatnonzero(theirs != found.weights)
    assert tokenizer.decode(found.ids[differ]).strip() == ""
    last = np.flatnonzero(found.weights)[-1]
    assert found.ids[last] == tokenizer.eos_id
    assert np.all(differ > last)


@pytest.mark.parametrize("name", [n for n, c in GOLDEN["marked_llama3"].items() if c.get("assistant")])
def test_generation_marks_as_transformers_reads_them(name):
    expected = GOLDEN["marked_llama3"][name]["assistant"]
    found = tokens_of("marked_llama3", chat_cases.CONVERSATIONS[name], "assistant")
    assert found.ids.tolist() == expected["input_ids"]
    assert found.weights.tolist() == expected["assistant_masks"]


SEVERAL = {
    "smollm2": ["Hello.<|im_end|>", "5<|im_end|>", "Yes.<|im_end|>"],
    "llama3": ["Hello.<|eot_id|>", "5<|eot_id|>", "Yes.<|eot_id|>"],
    "mistral": [" Hello.</s>", " 5</s>", " Yes.</s>"],
    "gemma": ["Hello.<end_of_turn>", "5<end_of_turn>", "Yes.<end_of_turn>"],
    "qwen3": ["Hello.<|im_end|>", "5<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"],
    "zephyr": ["Hello.</s>", "5</s>", "Yes.</s>"],
    "marked": ["Hello.<|im_end|>", "5<|im_end|>", "Yes.<|im_end|>"],
    "marked_llama3": ["Hello.<|eot_id|>", "5<|eot_id|>", "Yes.<|eot_id|>"],
}


@pytest.mark.parametrize("family", SEVERAL)
def test_every_assistant_turn_with_its_end_once(family):
    tokens = tokens_of(family, chat_cases.CONVERSATIONS["several"], "assistant")
    assert trained_texts(family, tokens) == SEVERAL[family]
    tokens = tokens_of(family, chat_cases.CONVERSATIONS["several"], "completion")
    assert trained_texts(family, tokens) == SEVERAL[family][-1:]
    tokens = tokens_of(family, chat_cases.CONVERSATIONS["several"], "all")
    assert np.all(tokens.weights[1:] == 1) and tokens.weights[0] == 0


def test_a_turn_equal_to_its_question_is_found():
    tokens = tokens_of("smollm2", chat_cases.CONVERSATIONS["repeats"], "assistant")
    assert trained_texts("smollm2", tokens) == ["blue<|im_end|>"] * 2


def test_an_end_token_spelt_out_in_an_answer_does_not_end_it():
    messages = [chat_cases.user("a"), chat_cases.assistant("b<|im_end|>c"), *chat_cases.CONVERSATIONS["single"]]
    tokens = tokens_of("qwen3", messages, "assistant")
    assert trained_texts("qwen3", tokens)[0] == "b<|im_end|>c<|im_end|>"


def test_a_tool_call_is_trained_and_its_result_is_not():
    tokens = tokens_of("qwen3", chat_cases.CONVERSATIONS["tools"], "assistant")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "é"}}\n</tool_call><|im_end|>'
    assert trained_texts("qwen3", tokens) == [call, "<think>\n\n</think>\n\n5<|im_end|>"]


def test_the_completion_starts_where_the_tokens_part():
    """TRL's rule at every split of a text, by a template that writes nothing of its own."""
    bare, tokenizer = (
        ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"),
        chat_cases.tokenizer("smollm2"),
    )
    text, earlier = " ".join((*chat_cases.tiny_text.TEXT, "nqhiqunsstoa nreswqateean hisotutrwqha")), 0
    for split in range(1, len(text) - 1):
        if not text[split:].strip() or not text[:split].strip():
            continue
        chat = Chat((chat_cases.user(text[:split]), chat_cases.assistant(text[split:])), 1)
        found = tokenize([chat], ["f:1"], tokenizer=tokenizer, template=bare, train_on="completion")[0]
        prompt, whole = tokenizer.encode(text[:split]), tokenizer.encode(text)
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
        assert np.flatnonzero(found.weights).tolist() == list(range(max(start, 1), len(whole)))
        assert bool(found.flags & 1) == (start < len(prompt))
        earlier += len(tokenizer.decode(whole[: start + 1])) < split
    assert earlier  # at some split even a token that lies before it changes


def test_one_bos():
    for family in ("llama3", "mistral", "gemma", "zephyr"):
        tokens = tokens_of(family, chat_cases.CONVERSATIONS["single"], "completion")
        tokenizer = chat_cases.tokenizer(family)
        assert np.count_nonzero(tokens.ids == tokenizer.bos_id) == (family != "zephyr")
    twice = "{{ bos_token + bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(LuthierError, match="f:1: the conversation begins with two BOS tokens"):
        template = ChatTemplate(twice, {"bos_token": "<s>"})
        chat = Chat(tuple(chat_cases.CONVERSATIONS["single"]), 1)
        tokenize([chat], ["f:1"], tokenizer=chat_cases.tokenizer("mistral"), template=template, train_on="all")


def test_the_clock_can_be_fixed():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=datetime.datetime(2024, 7, 26))
    assert template.render([]) == "26 Jul 2024"
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_python_internals_are_out_of_reach(source):
    with pytest.raises(LuthierError, match=r"^evil\.jinja: the chat template reaches for Python internals: .*"):
        ChatTemplate(source, name="evil.jinja").render(chat_cases.CONVERSATIONS["single"])


@pytest.mark.parametrize(
    "source,message",
    [
        ("{% for m in messages %}\n{{ m.content }", "t:2: the chat template is not Jinja"),
        ("{{ messages[0].content + none }}", "t: the chat template failed: TypeError"),
        ("{{ nothing.at.all }}", "t: the chat template refuses the conversation: 'nothing' is undefined"),
        ("{% for i in range(10000000) %}{% endfor %}", "t: the chat template failed: OverflowError"),
        ("{{ raise_exception('only one turn') }}", "t: the chat template refuses the conversation: only one turn"),
    ],
)
def test_a_broken_template_is_one_line(source, message):
    with pytest.raises(LuthierError) as error:
        ChatTemplate(source, name="t").render(chat_cases.CONVERSATIONS["single"])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_turns_that_cannot_be_told_apart():
    with pytest.raises(
        LuthierError, match=r"f:1: the template writes the messages before turn 3 differently.*generation"
    ):
        tokens_of("mistral", chat_cases.CONVERSATIONS["system_several"], "assistant")


def test_a_turn_without_an_end_is_not_given_the_next_ones():
    last_only = (
        "{% for m in messages %}{% if m.role == 'user' %}?{{ m.content }}|"
        "{% elif loop.last %}!{{ m.content }}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(LuthierError, match=r"f:1: no end of the assistant's turn 2 in the rendered conversation"):
        chat = Chat(tuple(chat_cases.CONVERSATIONS["several"]), 5)
        template, tokenizer = ChatTemplate(last_only), chat_cases.tokenizer("smollm2")
        tokenize([chat], ["f:1"], tokenizer=tokenizer, template=template, train_on="assistant")


def test_no_assistant_tokens_is_an_error():
    silent = ChatTemplate("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}")
    with pytest.raises(LuthierError, match="f:1: no token of this example is a target"):
        chat = Chat(tuple(chat_cases.CONVERSATIONS["single"]), 1)
        tokenize([chat], ["f:1"], tokenizer=chat_cases.tokenizer("smollm2"), template=silent, train_on="assistant")


def test_a_conversation_that_ends_with_the_user():
    messages = [*chat_cases.CONVERSATIONS["single"], chat_cases.user("Sure?")]
    with pytest.raises(LuthierError, match="f:1: the conversation ends with a user message"):
        tokens_of("smollm2", messages, "completion")
    assert trained_texts("smollm2", tokens_of("smollm2", messages, "assistant")) == ["The answer is 5.<|im_end|>"]


@pytest.mark.parity
def test_goldens_are_what_transformers_says():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=__import__("tokenizers").Tokenizer.from_str(chat_cases.tiny_text.tokenizer_json())
    )
    for family, (bos, eos) in chat_cases.FAMILIES.items():
        tokenizer.bos_token, tokenizer.eos_token = bos, eos
        tokenizer.chat_template = chat_cases.source(family)
        text = tokenizer.apply_chat_template(chat_cases.CONVERSATIONS["single"], tokenize=False)
        assert text == GOLDEN[family]["single"]["texts"][0]
