"""Writes chat/rendered.json: what transformers and TRL make of the templates in chat/.

Run from the repository root: `python tests/goldens/make_chat.py`.
"""

import json
import pathlib
import sys

import transformers
from trl.data_utils import _tokenize, common_prefix_length

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import chat_cases  # noqa: E402
import tiny_text  # noqa: E402


def main():
    golden = {}
    for family, (bos, eos) in chat_cases.FAMILIES.items():
        path = HERE / "tokenizer.tmp.json"
        path.write_text(tiny_text.tokenizer_json())
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=bos, eos_token=eos)
        path.unlink()
        tokenizer.chat_template = chat_cases.source(family)
        golden[family] = {name: _conversation(tokenizer, c) for name, c in chat_cases.CONVERSATIONS.items()}
    (HERE / "chat" / "rendered.json").write_text(json.dumps(golden, ensure_ascii=False))


def _conversation(tokenizer, messages):
    texts = [
        _or_error(lambda o=o: tokenizer.apply_chat_template(messages, tokenize=False, **o)) for o in chat_cases.OPTIONS
    ]
    found = {"texts": texts}
    if "endgeneration" in tokenizer.chat_template and "macro" not in tokenizer.chat_template:
        found["assistant"] = _or_error(
            lambda: dict(tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True))
        )
        if found["assistant"]:
            del found["assistant"]["attention_mask"]
            found["assistant"].pop("token_type_ids", None)
    found["completion"] = _or_error(lambda: _completion(tokenizer, messages))
    return found


def _completion(tokenizer, messages):
    """TRL's SFTTrainer.tokenize_fn on {"prompt": all but the last message, "completion": the last}."""
    prompt = _tokenize(tokenizer, messages[:-1], add_generation_prompt=True)["input_ids"]
    whole = _tokenize(tokenizer, messages)["input_ids"]
    start = common_prefix_length(prompt, whole)
    return {"input_ids": whole, "completion_mask": [0] * start + [1] * (len(whole) - start)}


def _or_error(make):
    try:
        return make()
    except Exception as error:  # a template's raise_exception, or a message that it cannot read
        print(type(error).__name__, error)
        return None


if __name__ == "__main__":
    main()
