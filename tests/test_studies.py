"""The harness of studies: cells are run once, rates are chosen apart, directions get the verdict of the seeds."""

import importlib
import json

import everyday
import gradients
import harness
import jax
import jax.numpy as jnp
import numpy as np
import page
import pytest
import tiny_policy
import yaml

from luthier import config
from luthier.decoding.batching import padded
from luthier.errors import LuthierError
from luthier.evals.cases import read_cases

STUDIES = [
    ("promot", "promot"),
    ("promot_tasks", "promot"),
    ("promot_format", "promot"),
    ("one_token_rollout", "one_token_rollout"),
    ("one_token_rollout_new", "one_token_rollout"),
    ("preference", "preference"),
    ("promot_smollm2", "smollm2"),
    ("one_token_rollout_smollm2", "smollm2"),
    ("preference_smollm2", "smollm2"),
]

PLAN = harness.Plan(
    name="demo",
    question="Is a better than b?",
    shows=("after-x",),
    directions=(
        {"measure": "after-x", "better": "a", "than": "b", "because": "it is made so"},
        {"measure": "after-x", "same": ["a", "a"], "within": 0.1, "because": "it is itself"},
        {"measure": "after-z", "better": "a", "than": "b", "because": "nobody measured it"},
    ),
    minutes=6.0,
    tune={"measure": "after-x", "seed": 9},
    seeds=(0, 1, 2),
    methods={"a": (0.1, 0.2), "b": (0.3,)},
)
VALUES = {("a", 0.1): 0.4, ("a", 0.2): 0.6, ("b", 0.3): 0.5}


def run(folder, calls):
    def train(cell, workdir):
        calls.append(cell.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        where = workdir / "evaluations" / "after-x.json"
        where.parent.mkdir(parents=True, exist_ok=True)
        value = VALUES[cell.method, cell.rate] + 0.01 * cell.seed * (cell.method == "a")
        where.write_text(json.dumps({"when": "after", "name": "x", "metric": "accuracy", "value": value}))

    return harness.run_study(PLAN, lambda cell: cell, folder, train)


def test_a_killed_study_goes_on_and_ends_in_a_page(tmp_path, capsys):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, calls)
    assert capsys.readouterr().out.startswith("demo: 8 of 8 cells left, about 0.8 hours\n")
    found = run(tmp_path, calls)
    assert "5 of 8 cells left" in capsys.readouterr().out
    assert len(calls) == 9 and calls[3] == calls[4], "only the cell that was killed is begun twice"
    assert found["rates"] == {"a": 0.2, "b": 0.3} and len(found["cells"]) == 6
    assert found == json.loads((tmp_path / "results.json").read_text())
    better, same, unmeasured = found["directions"]
    # Differences 0.10, 0.11, 0.12: mean 0.11, deviation 0.01, t(2) = 4.3027.
    half = 4.3027 * 0.01 / 3**0.5
    assert better["verdict"] == "holds" and better["difference"] == pytest.approx(0.11)
    np.testing.assert_allclose(better["interval"], [0.11 - half, 0.11 + half], atol=1e-5)
    assert (same["verdict"], unmeasured["verdict"]) == ("holds", "open")
    text = page.write_page(PLAN, found, tmp_path / "docs").read_text()
    assert "| a | 0.2 | 0.610 [0.585, 0.635] |" in text and "**holds**" in text
    assert "<svg" in (tmp_path / "docs" / "demo.svg").read_text()


def test_the_page_lists_the_tasks_behind_retention():
    cells = [
        {"method": method, "seed": seed, "measures": {"before-copy": 0.9, "kept-copy": change}}
        for method, changes in {"a": (-0.1, -0.2), "b": (0.051, 0.049)}.items()
        for seed, change in enumerate(changes)
    ]
    found = page.text(PLAN, {"cells": cells, "rates": {"a": 0.1, "b": 0.3}, "tuning": [], "directions": []})
    assert "| task | before | a | b |" in found and "| copy | 90% | -15 | +5 |" in found


@pytest.mark.parametrize(
    ("direction", "differences", "expected"),
    [
        ({"better": "a", "than": "b"}, [-0.2, -0.21, -0.19], "fails"),
        ({"better": "a", "than": "b"}, [-0.2, 0.3, 0.1], "open"),
        ({"better": "a", "than": "b"}, [0.2], "open"),
        ({"method": "a", "above": 0.1}, [0.2, 0.21, 0.19], "holds"),
        ({"method": "a", "above": 0.3}, [0.2, 0.21, 0.19], "fails"),
        ({"same": ["a", "b"], "within": 0.05}, [0.01, -0.01, 0.0], "holds"),
        ({"same": ["a", "b"], "within": 0.05}, [0.2, 0.21, 0.19], "fails"),
        ({"same": ["a", "b"], "within": 0.05}, [0.2, -0.2, 0.0], "open"),
    ],
)
def test_verdicts(direction, differences, expected):
    cells = [
        {"method": method, "seed": seed, "measures": {"m": value * (method == "a")}}
        for seed, value in enumerate(differences)
        for method in "ab"
    ]
    assert harness.verdict({"measure": "m", **direction}, cells)["verdict"] == expected


@pytest.mark.parametrize("name", yaml.safe_load(harness.PLANS.read_text()))
def test_plans_are_whole(name):
    plan = harness.read_plan(name)
    methods = {m for d in plan.directions for m in (d.get("same") or (d.get("better") or d["method"], d.get("than")))}
    assert methods <= {*plan.methods, None} and all("because" in d for d in plan.directions)
    assert plan.tune.get("seed") not in plan.seeds


def test_unknown_plan():
    with pytest.raises(LuthierError, match="no study 'smok'.*smoke"):
        harness.read_plan("smok")


@pytest.mark.parametrize(("study", "module"), STUDIES)
def test_every_method_has_a_recipe(tmp_path, study, module):
    plan = harness.read_plan(study)
    seen = {}
    for method, rates in plan.methods.items():
        for seed in (plan.tune["seed"], plan.seeds[0]):
            made = importlib.import_module(module).recipe(tmp_path / study, plan, harness.Cell(method, rates[0], seed))
            assert made.stages[-1].schedule.peak == rates[0] and made.seed == seed
            labels = {f"after-{evaluation.label}" for evaluation in made.evaluations}
            assert plan.tune["measure"].replace("before-", "after-") in labels
        seen[method] = config.to_json(made).replace(made.name, "")
    assert len(set(seen.values())) == len(seen), "two methods are one"


def test_everyday_tasks_ask_what_they_do_not_show(tmp_path):
    everyday.write(tmp_path)
    for spec in everyday.evaluations(tmp_path):
        asked, shown = ({case.prompt for case in read_cases(file)} for file in (spec.data, spec.shots_from))
        assert len(asked) >= 30 and len(shown) > spec.shots and not asked & shown
    assert len(list(tmp_path.iterdir())) == len(everyday.TASKS) == 10


def test_gradients_of_a_task_and_of_its_format(tmp_path, monkeypatch):
    """The cosine is that of gradients by hand, 1 for the same file and less with answers of other inputs."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    policy = tiny_policy.policy()
    texts = {"task": [(f"{i}", f"{7 * i}") for i in range(60)], "moved": [(f"{i}", f"{7 * i + 21}") for i in range(60)]}
    for name, pairs in texts.items():
        lines = (json.dumps({"prompt": x, "completion": y}) + "\n" for x, y in pairs)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    task, moved = (str(tmp_path / f"{name}.jsonl") for name in texts)
    same, less = (gradients.cosine(policy, label="alike", data=task, other=file) for file in (task, moved))
    assert same.value == pytest.approx(1, abs=1e-6) and all(abs(x - 1) < 1e-6 for x in same.metrics.values())
    assert less.value < 0.999 and set(less.metrics) == {"mlp", "q", "k", "v", "o"}

    @jax.jit
    @jax.grad
    def gradient(params, tokens, weights, batch):
        logits = policy.bound.unembed({"params": params}, policy.bound.hidden({"params": params}, batch)[0])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        return -(weights[:, 1:] * chosen).sum() / weights.sum()

    def of_queries(pairs):
        rows = [(policy.text_ids(x), [*policy.tokenizer.encode(y), policy.tokenizer.eos_id]) for x, y in pairs]
        weights = np.array([np.pad([0] * len(x) + [1] * len(y), (0, 16 - len(x + y))) for x, y in rows])
        batch = padded([x + y for x, y in rows], 16, left=False)
        return gradient(policy.variables["params"], batch["tokens"], weights, batch)["layers"]["attention"]["q"]

    ours, theirs = (of_queries(pairs)["kernel"] for pairs in texts.values())
    expected = jnp.vdot(ours, theirs) / jnp.linalg.norm(ours) / jnp.linalg.norm(theirs)
    assert less.metrics["q"] == pytest.approx(float(expected), abs=1e-4)
