"""Small Hugging Face directories for tests: golden models with a tokenizer of a few words."""

import json
import pathlib
import shutil

import hf_layout
import jax
import numpy as np
import tokenizers

from luthier.data.tokenizer import Tokenizer

WORDS = ("<s>", "</s>", "<unk>", "the", "sky", "is", "blue")


def word_tokenizer(words=WORDS) -> Tokenizer:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    side = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    side["tokenizer_class"] = "PreTrainedTokenizerFast"
    return Tokenizer.from_files(
        {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(side).encode()}
    )


def family_directory(folder: pathlib.Path, family: str) -> pathlib.Path:
    """A copy of a golden model with a tokenizer beside it."""
    shutil.copytree(hf_layout.GOLDENS / "families" / family, folder, ignore=shutil.ignore_patterns("*.npz"))
    for name, content in word_tokenizer().files.items():
        (folder / name).write_bytes(content)
    return folder


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(lambda x, y: np.testing.assert_equal(np.dtype(x.dtype), np.dtype(y.dtype)), a, b)
