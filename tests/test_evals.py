"""Verifiers, few-shot prompts, tasks and their files."""

import dataclasses
import json
import math
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
import tiny_policy

from luthier.config import spec
from luthier.decoding import Generation, score
from luthier.errors import LuthierError
from luthier.evals import EvalResult, evaluate, read_results, tasks, verifiers, write_result
from luthier.evals.cases import few_shot, read_cases


@pytest.fixture(scope="module")
def policy():
    return tiny_policy.policy()


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("name", "completion", "record", "expected"),
    [
        ("exact", " 85 ", {"completion": "85"}, 1),
        ("exact", "85.", {"completion": "85"}, 0),
        ("integer", " 85.\nNext: 12", {"completion": " 85"}, 1),
        ("integer", "27 + 58 = 85", {"completion": "85"}, 1),
        ("integer", "I think\nthe answer is 1,085!", {"completion": "1085"}, 1),
        ("integer", "85 or 86", {"completion": "85"}, 0),
        ("integer", "-13", {"completion": "13"}, 0),
        ("integer", "7-20 = -13", {"completion": " -13"}, 1),
        ("integer", "850", {"completion": "85"}, 0),
        ("integer", "85.5", {"completion": "85"}, 0),
        ("integer", "none", {"completion": "85"}, 0),
        ("integer", "", {"completion": "0"}, 0),
        ("integer", "so 4", {"completion": "2 + 2 = 4", "answer": 4}, 1),
        ("integer", "4", {"completion": [{"role": "assistant", "content": "It is 4."}]}, 1),
        ("integer", "4", {"reward_model": {"style": "rule", "ground_truth": "4"}}, 1),
        ("first_integer", "85, since 80 + 5 is 85", {"completion": "85"}, 1),
        ("first_integer", "5 + 80 = 85", {"completion": "85"}, 0),
        ("regex", " yes!", {"pattern": r"(?i)yes\W*"}, 1),
        ("regex", "yes, no", {"pattern": r"(?i)yes\W*"}, 0),
        ("contains", "It is Paris.", {"answer": "paris"}, 1),
        ("contains", "It is Rome.", {"answer": "paris"}, 0),
    ],
)
def test_verifiers(name, completion, record, expected):
    assert verifiers.find(name)(completion, record) == expected


def test_few_shot_text_is_training_examples_in_a_row(tmp_path):
    train = [{"prompt": f"Q{i}:", "completion": f" {i}"} for i in range(20)]
    pool = read_cases(jsonl(tmp_path / "train.jsonl", train))
    cases = read_cases(jsonl(tmp_path / "test.jsonl", [{"prompt": f"Q{i}:", "completion": "x"} for i in (3, 3, 50)]))
    prompts = few_shot(cases, pool, 4, seed=1)
    for case, prompt in zip(cases, prompts):
        *shots, last = prompt.split("\n\n")
        assert last == case.prompt and len(set(shots)) == 4
        assert set(shots) <= {r["prompt"] + r["completion"] for r in train} - {"Q3: 3"} | (
            {"Q3: 3"} if last != "Q3:" else set()
        )
    assert prompts == few_shot(cases, pool, 4, seed=1) != few_shot(cases, pool, 4, seed=2)
    assert prompts[0] != prompts[1]
    assert few_shot(cases, [], 0, seed=1) == [case.prompt for case in cases]


def test_few_shot_chats_become_turns(tmp_path):
    def turns(i):
        return [
            {"role": "system", "content": "S"},
            {"role": "user", "content": f"Q{i}"},
            {"role": "assistant", "content": f"A{i}"},
        ]

    pool = read_cases(jsonl(tmp_path / "train.jsonl", [{"messages": turns(i)} for i in range(5)]))
    (case,) = read_cases(jsonl(tmp_path / "test.jsonl", [{"messages": turns(9)}]))
    assert case.answer == "A9"
    (prompt,) = few_shot([case], pool, 2, seed=0)
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert prompt[-1]["content"] == "Q9" and prompt[2]["content"] == prompt[1]["content"].replace("Q", "A")


def test_a_prompt_alone_is_asked_after_its_system(tmp_path):
    user = {"role": "user", "content": "Q"}
    records = [{"prompt": [user], "system": "S"}, {"prompt": [user], "system": None}, {"prompt": "Q"}]
    cases = read_cases(jsonl(tmp_path / "test.jsonl", records))
    assert [case.prompt for case in cases] == [({"role": "system", "content": "S"}, user), (user,), "Q"]
    with pytest.raises(LuthierError, match="'system' stands beside a prompt of plain text"):
        read_cases(jsonl(tmp_path / "bad.jsonl", [{"prompt": "Q", "system": "S"}]))


def test_verifier_asks_scores_and_writes(policy, tmp_path, monkeypatch):
    """The policy is replaced by one that is right three times in four."""
    records = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)]
    data = jsonl(tmp_path / "test.jsonl", records)
    shots = jsonl(
        tmp_path / "train.jsonl", [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(90, 99)]
    )
    asked = []

    def answer(policy, prompts, sampling, **_):
        asked.append((prompts, sampling))
        values = [int(p.split("\n\n")[-1].split()[0]) + (1 if i % 4 else 7) for i, p in enumerate(prompts)]
        return [Generation(f" {v}", (1, 2), (0.0, 0.0), "eos") for v in values]

    monkeypatch.setattr(tasks, "generate", answer)
    chosen = [
        spec("verifier", label="sums", data=data),
        spec("verifier", label="sums-2", data=data, shots=2, shots_from=shots, limit=4),
    ]
    found = evaluate(policy, chosen, workdir=tmp_path, when="before", note="a note")
    zero, two = found["sums"], found["sums-2"]
    assert (zero.metric, zero.value, zero.n, zero.shots, zero.note) == ("accuracy", 0.75, 8, 0, "a note")
    assert (two.value, two.n, two.shots) == (0.75, 4, 2)
    assert zero.low == pytest.approx(0.4093, abs=1e-3) and zero.high == pytest.approx(0.9285, abs=1e-3)
    assert zero.records[1] == {
        "prompt": "1 + 1 =", "expected": " 2", "completion": " 2", "score": 1.0, "finish_reason": "eos",
    }  # fmt: skip
    assert asked[1][1].stop == ("\n\n",) and asked[0][1].stop == ()
    stored = json.loads((tmp_path / "evaluations" / "before-sums.json").read_text())
    assert stored["when"] == "before" and stored["value"] == 0.75
    assert read_results(tmp_path) == {"before-sums": zero, "before-sums-2": two}
    again = evaluate(policy, chosen, workdir=tmp_path, when="before", note="a note")
    assert len(asked) == 2 and again["sums"].value == 0.75, "a finished evaluation is not run twice"
    evaluate(policy, [spec("verifier", label="sums", data=data, limit=3)], workdir=tmp_path, when="before")
    assert len(asked) == 3, "another spec under the same label is"


def test_verifier_end_to_end(policy, tmp_path):
    data = jsonl(
        tmp_path / "chat.jsonl",
        [{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}],
    )
    found = tasks.verifier(policy, label="chat", data=data, max_new_tokens=4)
    assert found.n == 1 and found.value in (0.0, 1.0) and isinstance(found.records[0]["completion"], str)


def test_choices_take_the_likeliest_option(policy, tmp_path):
    questions = [
        {"task": "t", "input": "The sky", "output": "is blue", "options": ["is blue", "no", "perhaps it is"]},
        {"prompt": "A:", "options": [" one", " twenty-two"], "answer": 1},
    ]
    found = tasks.choices(policy, label="c", data=jsonl(tmp_path / "c.jsonl", questions), normalise="tokens")
    assert found.n == 2 and 0 <= found.low <= found.value <= found.high <= 1
    for record, question in zip(found.records, questions):
        start = question.get("prompt", question.get("input", "") + "\n")
        scores = score(policy, [{"prompt": start, "completion": o} for o in question["options"]])
        np.testing.assert_allclose(record["logprobs"], [s.logprob for s in scores], atol=1e-4)
        best = max(range(len(scores)), key=lambda i: np.mean(scores[i].logprobs))
        assert record["completion"] == question["options"][best]
    assert found.records[1]["expected"] == " twenty-two"


def test_perplexity_is_exp_of_mean_nll(policy, tmp_path):
    texts = ["Once upon a time", "x" * 700, "the end"]
    data = jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    found = tasks.perplexity(policy, label="p", data=data)
    forward = jax.jit(
        lambda batch: policy.bound.unembed(policy.variables, policy.bound.hidden(policy.variables, batch)[0])
    )
    nll, count = 0.0, 0
    for text in texts:
        ids = [*policy.tokenizer.encode(text), policy.tokenizer.eos_id]
        for start in range(0, len(ids) - 1, 512):  # the context is 512
            window = np.asarray(ids[start : start + 513])
            tokens = np.zeros((1, 512), np.int32)
            tokens[0, : len(window) - 1] = window[:-1]
            batch = {"tokens": tokens, "positions": np.arange(512)[None], "segment_ids": np.ones_like(tokens)}
            logprobs = jax.nn.log_softmax(forward(batch)[0])
            nll -= float(logprobs[np.arange(len(window) - 1), window[1:]].sum())
            count += len(window) - 1
    assert found.metrics["tokens"] == count
    assert found.value == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert found.low <= found.value <= found.high


def test_results_survive_the_disk(tmp_path):
    result = EvalResult(
        "a", "perplexity", 3.0, 2.0, 4.0, 1, {"perplexity": 3.0}, records=({"prompt": "ü", "score": 1.0},)
    )
    write_result(tmp_path, "step-20", result)
    assert read_results(tmp_path) == {"step-20-a": result}
    assert json.loads((tmp_path / "evaluations" / "step-20-a.json").read_text())["step"] == 20
    assert read_results(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 2}, "shots_from: shots=2 needs a source"),
        ({"verifier": "intger"}, "Did you mean 'integer'"),
        ({"data": "RECORDS", "verifier": "regex"}, r"test.jsonl:1: the record has no `pattern`"),
        ({"shots": 9, "shots_from": "RECORDS"}, "9 solved examples are asked for and 0 are there"),
    ],
)
def test_mistakes(policy, tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(
        tasks, "generate", lambda policy, prompts, *_, **__: [Generation("1", (1,), (0.0,), "eos")] * len(prompts)
    )
    data = jsonl(tmp_path / "test.jsonl", [{"prompt": "1 =", "completion": " 1"}])
    options = {key: data if value == "RECORDS" else value for key, value in {"data": data, **options}.items()}
    with pytest.raises(LuthierError, match=message):
        evaluate(policy, [spec("verifier", label="x", **options)])


def test_labels_must_differ_and_name_files(policy, tmp_path):
    data = jsonl(tmp_path / "test.jsonl", [{"prompt": "1 =", "completion": " 1"}])
    with pytest.raises(LuthierError, match="labels repeat"):
        evaluate(policy, [spec("verifier", label="x", data=data)] * 2)
    with pytest.raises(LuthierError, match="cannot name a file"):
        evaluate(policy, [spec("verifier", label="../x", data=data)])
    assert dataclasses.is_dataclass(EvalResult)


def test_chain_sum_is_what_its_script_makes():
    """Answers by evaluating the problem as written; train and test share none; the files are current."""
    folder = pathlib.Path(__file__).parents[1] / "configs" / "tasks" / "chain_sum"
    made = runpy.run_path(str(folder / "make.py"))
    files = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "test")}
    drawn = [made["record"](*problem) for problem in made["problems"](made["TRAIN"] + made["TEST"], seed=0)]
    assert files["train"] + files["test"] == drawn
    prompts = [record["prompt"] for record in drawn]
    assert len(set(prompts)) == len(prompts) and len(files["test"]) >= 300
    for name in ("pairs", "labels", "ranked"):
        files[name] = [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
        assert [record["prompt"] for record in files[name]] == prompts[: made["COMPARED"]]
    for pair, label, ranked, record in zip(files["pairs"], files["labels"], files["ranked"], drawn):
        right = record["completion"]
        assert pair["chosen"] == right != pair["rejected"] and label["label"] == (label["completion"] == right)
        assert right == max(zip(ranked["scores"], ranked["completions"]))[1] and len(set(ranked["completions"])) == 4
    for record in drawn:
        assert int(record["completion"]) == eval(re.search(r"-?\d+ [+-] \d+", record["prompt"])[0])
        assert verifiers.integer(record["completion"], record) == 1
