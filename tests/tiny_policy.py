"""A random two-layer policy over bytes, for tests of everything that asks a model."""

import json

import flax.linen as nn
import jax
import tokenizers

from luthier.data.chat import ChatTemplate
from luthier.data.tokenizer import Tokenizer
from luthier.decoding import Policy
from luthier.models import ModelConfig, Transformer
from luthier.tuners import bind

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer() -> Tokenizer:
    """One token a byte, then the special ones; `<|im_end|>` ends a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "chat_template": CHATML}
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return Tokenizer.from_files(files)


def config(**changes) -> ModelConfig:
    hf = {
        "model_type": "llama",
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return ModelConfig.from_hf({**hf, **changes})


def policy(seed: int = 0, scale: float = 12.0, **changes) -> Policy:
    """Weights are scaled up so that the next token hangs on the whole context and is far from uniform."""
    bound = bind(Transformer(config(**changes), remat="none"))
    variables = nn.meta.unbox(jax.jit(bound.init)(jax.random.key(seed)))
    variables = jax.tree.map(lambda x: x if x.ndim < 2 or x.min() == x.max() else x * scale, variables)
    made = tokenizer()
    return Policy(bound, variables, made, ChatTemplate(made.chat_template, made.special_tokens))
