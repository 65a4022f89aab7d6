"""Chat templates in the style of several families, and conversations to render with them."""

import pathlib

import tiny_text

from luthier.data.chat import ChatTemplate
from luthier.data.tokenizer import Tokenizer

FOLDER = pathlib.Path(__file__).parent / "goldens" / "chat"
# Template → its tokenizer's BOS and EOS; the second also ends its turns.
FAMILIES = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "zephyr": ("<s>", "</s>"),
    "marked": ("<|im_start|>", "<|im_end|>"),
    "marked_llama3": ("<|begin_of_text|>", "<|eot_id|>"),
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


SYSTEM = {"role": "system", "content": "You are a pirate. "}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é"}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <a> & b", "parameters": {"type": "object"}},
}
CONVERSATIONS = {
    "single": [user("What is 2 + 3?"), assistant("The answer is 5.")],
    "several": [
        user("Hi"),
        assistant("Hello."),
        user("What is 2 + 3?"),
        assistant("5"),
        user("Sure?"),
        assistant("Yes."),
    ],
    "system": [SYSTEM, user("What is blue?"), assistant("The sky is blue.")],
    "system_several": [SYSTEM, user("Hi"), assistant("Hello."), user("How many?"), assistant("twelve")],
    "unicode": [user("Größe? 你好 🙂"), assistant("  naïve\n\n\nanswer ✓ \n")],
    "repeats": [user("blue"), assistant("blue"), user("blue blue"), assistant("blue")],
    "thinking": [
        user("2 + 3?"),
        assistant("5", reasoning_content="two and three"),
        user("+ 1?"),
        assistant("6", reasoning_content="six"),
    ],
    "thinking_by_another_name": [user("2 + 3?"), assistant("5", thinking="two and three")],
    "thought_inside": [user("2 + 3?"), assistant("<think>\nadd\n</think>\n\n5")],
    "tools": [user("2 + é?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "five"}, assistant("5")],
}
OPTIONS = (
    {},
    {"add_generation_prompt": True},
    {"tools": [TOOL]},
    {"add_generation_prompt": True, "enable_thinking": False},
)


def source(family: str) -> str:
    return (FOLDER / f"{family}.jinja").read_text()


def tokenizer(family: str) -> Tokenizer:
    bos, eos = FAMILIES[family]
    return tiny_text.tiny_tokenizer(bos_token=bos, eos_token=eos, chat_template=source(family))


def template(family: str) -> ChatTemplate:
    bos, eos = FAMILIES[family]
    return ChatTemplate(source(family), {"bos_token": bos, "eos_token": eos}, name=f"{family}.jinja")
