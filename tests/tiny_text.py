"""A small byte-level BPE tokenizer for tests, with the special tokens of several families."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from luthier.data.tokenizer import Tokenizer

SPECIAL = (
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
TEXT = (
    "You are a helpful assistant. What is 2 + 3? The answer is 5. The sky is blue.",
    "user assistant system\nWrite a short poem about the sea.\n\nThe sea is wide and deep and blue.",
    "Below is an instruction that describes a task. Question: how many? Answer: twelve, or thirteen.",
)


@functools.cache
def tokenizer_json(adds: str = "") -> str:
    """A `tokenizer.json`; `adds` names what goes around a text: "", "bos" (<s>) or "bos+eos" (</s>)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    if adds:
        special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        single = "<s> $A </s>" if adds == "bos+eos" else "<s> $A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return backend.to_str()


def files(*, adds: str = "", **config) -> dict[str, bytes]:
    """The files of a tokenizer directory."""
    config = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    return {"tokenizer.json": tokenizer_json(adds).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def tiny_tokenizer(*, adds: str = "", **config) -> Tokenizer:
    return Tokenizer.from_files(files(adds=adds, **config))
