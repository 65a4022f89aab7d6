"""Beam search: the texts and scores of transformers, and the best of all texts where the beam is wide enough."""

import itertools
import json
import types

import hf_layout
import jax
import numpy as np
import pytest
import tiny_training

from luthier.decoding import Policy, Sampling, generate
from luthier.errors import LuthierError

GOLDEN = json.loads((hf_layout.GOLDENS / "beams.json").read_text())
SETTINGS = sorted({(c["beams"], c["length_penalty"], c["limit"], tuple(c["eos"])) for c in GOLDEN})


def policy(eos) -> Policy:
    bound, params = tiny_training.bound_model("llama_gqa_tied")
    spell = lambda tokens, skip_special: " ".join(map(str, tokens))  # noqa: E731
    return Policy(bound, {"params": params}, types.SimpleNamespace(eos_ids=eos, decode=spell))


def score(generation, length_penalty) -> float:
    return sum(generation.logprobs) / len(generation.logprobs) ** length_penalty


@pytest.mark.parametrize("beams, length_penalty, limit, eos", SETTINGS)
def test_texts_are_those_of_transformers(beams, length_penalty, limit, eos):
    sampling = Sampling(max_new_tokens=limit, beams=beams, length_penalty=length_penalty)
    mine = (beams, length_penalty, limit, list(eos))
    cases = [c for c in GOLDEN if (c["beams"], c["length_penalty"], c["limit"], c["eos"]) == mine]
    made = generate(policy(eos), [case["prompt"] for case in cases], sampling, batch_size=4)
    for case, generation in zip(cases, made, strict=True):
        assert list(generation.token_ids) == case["tokens"]
        assert score(generation, length_penalty) == pytest.approx(case["score"], abs=1e-4)
        assert generation.finish_reason == ("eos" if case["tokens"][-1] in eos else "length")


def test_a_wide_beam_finds_the_best_of_all_texts():
    """All texts of two tokens, or of one that ends, by brute force."""
    eos, prompt = (7, 9), [5, 80]
    asked = policy(eos)
    first = _logprobs(asked, [prompt])[0]
    second = _logprobs(asked, [[*prompt, token] for token in range(128)])
    found = {(token,): first[token] for token in eos}
    found |= {(a, b): (first[a] + second[a, b]) / 2 for a, b in itertools.product(range(128), repeat=2) if a not in eos}
    (made,) = generate(asked, [prompt], Sampling(max_new_tokens=2, beams=128))
    assert made.token_ids == max(found, key=found.get)
    assert score(made, 1.0) == pytest.approx(max(found.values()), abs=1e-4)


def _logprobs(asked, rows):
    rows = np.asarray(rows)
    batch = {"tokens": rows, "segment_ids": np.ones_like(rows), "positions": np.arange(rows.shape[1])[None] + 0 * rows}
    hidden, _ = asked.bound.hidden(asked.variables, batch)
    return np.asarray(jax.nn.log_softmax(asked.bound.unembed(asked.variables, hidden[:, -1])))


def test_a_stop_string_cuts_the_best_text():
    (case,) = [c for c in GOLDEN if c["beams"] == 2][:1]
    stop = f" {case['tokens'][2]}"
    sampling = Sampling(max_new_tokens=case["limit"], beams=2, stop=(stop,))
    (made,) = generate(policy(tuple(case["eos"])), [case["prompt"]], sampling)
    assert made.finish_reason == "stop" and made.text == " ".join(map(str, case["tokens"][:2]))


def test_beams_do_not_sample():
    with pytest.raises(LuthierError, match="beams"):
        Sampling(beams=4, temperature=1.0)
