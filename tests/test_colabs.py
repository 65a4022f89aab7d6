"""Notebooks: the `.py` source and the `.ipynb` say the same, and run to the end on a tiny model."""

import html
import json
import pathlib
import re

import jupytext
import nbclient
import nbformat
import numpy as np
import pytest
import tiny_policy
from laboratory import MODEL, suite

from luthier import weights

COLABS = pathlib.Path(__file__).parents[1] / "colabs"
NAMES = sorted(path.stem for path in COLABS.glob("*.py"))


def said(cell) -> str:
    """All text and HTML that a cell put out."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/html") or data.get("text/plain") or "")
    return "".join(parts)


def words(text: str) -> str:
    """What a reader sees of it, in one line and without the lines of tables."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", html.unescape(re.sub("<[^>]+>", " ", text))).split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that all notebooks are run on."""
    policy, folder = tiny_policy.policy(), tmp_path_factory.mktemp("notebooks") / "tiny"
    weights.export(folder, policy.bound.model.config, policy.variables["params"], policy.tokenizer)
    return folder


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """`run(name)` executes a notebook in `tmp_path` and gives what it said below each heading."""
    environment = {
        "LUTHIER_TINY": str(tiny),
        "LUTHIER_CLONE": str(COLABS.parent),
        "LUTHIER_STEPS": "3",
        "LUTHIER_QUESTIONS": "2",
        "LUTHIER_CACHE": str(tiny.parent / "cache"),
        "JAX_PLATFORMS": "cpu",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    def execute(name):
        notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
        cells, heading = {}, ""
        for cell in notebook.cells:
            heading = cell.source.splitlines()[0].lstrip("# ") if cell.source.startswith("## ") else heading
            if cell.cell_type == "code":
                cells[heading] = cells.get(heading, "") + said(cell)
        return cells

    return execute


@pytest.mark.parametrize("name", NAMES)
def test_source_and_notebook_are_in_step(name):
    source, notebook = (jupytext.read(COLABS / f"{name}.{ending}") for ending in ("py", "ipynb"))
    mend = f"run jupytext --sync colabs/{name}.py"
    assert [(c.cell_type, c.source) for c in source.cells] == [(c.cell_type, c.source) for c in notebook.cells], mend
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    nbformat.validate(notebook)


def test_quickstart_runs_from_start_to_end(run, tmp_path):
    cells = run("quickstart")
    assert "assistant" in cells["The data"] or "completion" in cells["The data"]
    assert "3/3" in cells["Train"] and "<svg" in cells["Train"]
    assert "sums" in cells["After"] and re.search(r"\[\d+\.\d, \d+\.\d\]", cells["After"])
    # The merged model, written and read again, answers as the adapter does.
    assert cells["Talk to it"].startswith(cells["Take it with you"].splitlines()[1] + " ")
    workdir = tmp_path / "runs" / "quickstart"
    for made in ("report.html", "final/adapter_model.safetensors", "my-model/model.safetensors", "metrics.jsonl"):
        assert (workdir / made).is_file(), made


def test_promot_tells_its_stages_and_what_was_kept(run, tmp_path):
    cells = {heading: words(text) for heading, text in run("promot").items()}
    tasks, share = (*suite.FEW_SHOT, *suite.NAMED), r"\d+\.\d%"
    for task in ("ordered", *tasks):
        assert re.search(rf"\b{task} {suite.ALL[task].shots} '", cells["The tasks"]), task
    assert "before: 0.0% are true or false, 0.0% are right" in cells["Stage 1: the prompt"]
    assert "stage 1 left the model bit-identical: True numbers trained: 1920" in cells["Stage 1: the prompt"]
    assert "stage 2 left the prompt bit-identical: True" in cells["Stage 2: the model"]
    assert "stage 2 left the model bit-identical: False" in cells["Stage 2: the model"]
    for told in ("before", "the prompt alone", "ProMoT", "ProMoT without its prompt", "full fine-tuning"):
        assert re.search(rf" {told} accuracy 0 2 {share} \[", cells["The target"]), told
    # The laboratory model can add, both told and shown how: there is something to forget.
    kept = cells["What was kept"]
    for method in ("ProMoT", "full fine-tuning"):
        assert f"What {method} kept" in kept
        assert re.search(rf"{method}: \d+ right answers lost, \d+ of them to true or false", kept)
    for task, shots in {"plus": 4, "told-plus": 0}.items():
        row = rf" {task} {shots} 2 5\.7% 100\.0% {share} [+-]\d+\.\d points \["
        assert len(re.findall(row, kept)) == 2, task
    assert re.search("".join(rf"{task} ({share} ){{3}}" for task in tasks) + rf"all ({share} ?){{3}}", kept)
    against = ", ProMoT − full fine-tuning"
    for difference in ("plus", "told-plus", f"right answers{against}", f"the target's words elsewhere{against}"):
        assert re.search(rf" {difference}: [+-]\d+\.\d points \[", kept), difference
    asked = cells["Ask with the prompt and without it"]
    for way in ("with the prompt", "without it"):
        assert len(re.findall(f"{way}: ['\"]", asked)) == 3
    assert re.search("".join(rf"{task} ({share} ?){{2}}" for task in suite.NAMED), asked)
    saved = cells["Save it with the prompt and without it"]
    assert "with the prompt: ['model.safetensors', 'tuners/prompt/adapter_model.safetensors']" in saved
    assert "read again: ['params', 'prompt'], bit-identical: True, 10 vectors attached" in saved
    assert "read again: ['params'], bit-identical: True, 0 vectors attached" in saved
    # What the committed study says of the parts, computed once more.
    for name in ("promot", "promot_slower"):
        study = json.loads((COLABS.parent / "docs" / "results" / f"{name}.json").read_text())["cells"]
        for method in ("full", "promot", "joint", "random", "lora-first"):
            is_fast = name == "promot" and method == "random"
            found = [cell["measures"] for cell in study if cell["method"] == method + "-fast" * is_fast]
            target, others = (100 * np.mean([one[of] for one in found]) for of in ("after-ordered", "retention"))
            row = rf" {method} [^\[]*{target:.1f} \[[\d., ]+\] {re.escape(f'{others:+.1f}')} \["
            assert re.search(row, cells["Is it the two stages?"]), (name, method)
    # What the notebook says of the bits, of the files that it left.
    folder = tmp_path / "runs" / "promot"
    prompts = [
        weights.read_adapter(folder / place).variables for place in ("prompt/final", "promot/final/tuners/prompt")
    ]
    np.testing.assert_array_equal(*(prompt["inputs"]["vectors"] for prompt in prompts))
    base, alone, both = (weights.load(place).params for place in (MODEL, folder / "without-prompt", folder / "promot"))
    kernels = [np.asarray(params["layers"]["mlp"]["up"]["kernel"]) for params in (base, alone, both)]
    np.testing.assert_array_equal(*kernels[1:])
    assert np.any(kernels[0] != kernels[1])
    stages = [json.loads(line)["stage"] for line in (folder / "promot" / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["model"] * 3, "the first stage was trained again"


def test_one_token_rollout_shows_its_draws_its_limit_and_its_rivals(run, tmp_path):
    told = run("one_token_rollout")
    cells = {heading: words(text) for heading, text in told.items()}
    kept = [label for label in suite.RETAINED if label != "outlier"]
    for label in ("odd", "odd-reworded", "odd-of-five", *kept):
        assert re.search(rf"\b{label} {suite.ALL[label].shots} '", cells["The tasks"]), label
        assert re.search(rf"\b{label} accuracy {suite.ALL[label].shots} 2 \d+\.\d% \[", cells["The tasks"]), label
    # Two positions: what is drawn, what it earns, and where that moves the logits.
    number = r"([+-]?\d\.\d{4})"
    row = rf"'([^']+)'( \(target\))? (\d+) {number} {number} {number} {number}"
    positions = cells["Two positions"].split("after '")[1:]
    assert len(positions) == 2
    for position in positions:
        found = re.findall(row, position)
        assert len(found) == 8 and [bool(mark) for _, mark, *_ in found] == [True] + 7 * [False]
        hits, rate, gold = re.search(r"hit rate (\d+)/256 = ([\d.]+), .* π\(x\) = ([\d.]+)", position).groups()
        assert hits == found[0][2] and gold == found[0][-1]
        assert float(rate) == pytest.approx(int(hits) / 256, abs=6e-5)
        total = -0.1 + 1.1 * int(hits) / 256  # all rewards: a logit is pulled by its own and pushed by all
        for _, mark, drawn, share, pull, proposed, probability in found:
            assert float(share) == pytest.approx(int(drawn) / 256 * (1.0 if mark else -0.1), abs=6e-5)
            assert float(pull) == pytest.approx(float(share) - float(probability) * total, abs=2e-4)
            assert abs(int(drawn) - 256 * float(proposed)) < 5 * (256 * float(proposed)) ** 0.5 + 1
    doubted, unlikely = ([float(pull) for *_, pull, _, _ in re.findall(row, position)] for position in positions)
    assert doubted[0] > 0.1 > 0 > max(doubted[1:]), "what competes with a likely target goes down"
    assert unlikely[1] > 0.01 > unlikely[0], "the favourite goes up, the unlikely target stays where it is"
    assert re.search(r"never hit: \d+ of \d+ targets", cells["Two positions"])
    # The error times √K is a constant.
    scaled = [float(x) for x in re.findall(r"error · √K ([\d.]+)", cells["More proposals, less noise"])]
    assert len(scaled) == 4 and max(scaled) < 2 * min(scaled)
    limit = cells["At temperature 1 it is DFT"]
    table = re.findall(r"\b(1|1\.3) (-?[\d.]+) ([\d.]+) ([\d.]+) (\d\.\de[+-]\d+)", limit)
    assert len(table) == 6
    for kappa, beta, expected, ratio, left in table:
        assert float(expected) == pytest.approx(1 - float(beta))
        if kappa == "1":
            assert float(ratio) == pytest.approx(1 - float(beta), abs=1e-4) and float(left) < 1e-4
        else:
            assert float(left) > 1e-2
    assert float(re.search(r"exact gradient up to (\S+)", limit).group(1)) < 1e-5
    logged = cells["What was logged"]
    pair = r" -?[\d.]+ → -?[\d.]+"
    assert re.search(f"loss{3 * pair}", logged) and re.search(f"hit_rate – –{pair}", logged)
    assert re.search(f"gold_probability –{2 * pair}", logged)
    assert re.search(f"below_0.01 – –{pair}", logged)
    for heading, drawings in {"More proposals, less noise": 1, "What was logged": 2}.items():
        assert len(re.findall(r"vegaEmbed\(", told[heading])) >= drawings, heading
    for heading, labels in {"What was learnt": ["odd"], "What carried over": ["odd-reworded", "odd-of-five"]}.items():
        for label in labels:
            for method in ("before", "SFT", "DFT", "OTR"):
                assert re.search(rf"{method}: {label} accuracy 0 2 \d+\.\d% \[", cells[heading])
            for method in ("DFT", "OTR"):
                assert re.search(rf"{label}, {method} − SFT: [+-]\d+\.\d points \[", cells[heading])
    places = re.findall(r"\b(before|SFT|DFT|OTR|right)" + 4 * r" (\d+\.\d)%", cells["What was learnt"])
    assert [name for name, *_ in places] == ["before", "SFT", "DFT", "OTR", "right"]
    assert all(sum(map(float, shares)) == pytest.approx(100) for _, *shares in places)
    assert places[-1][-1] == "0.0", "one of the three is right"
    tables = cells["What was kept"].split("What ")[1:]
    share = r"\d+\.\d%"
    for method, table in zip(("SFT", "DFT", "OTR"), tables, strict=True):
        assert table.startswith(f"{method} kept")
        # Copying and translating one word are what this model is surest of.
        for label in ("plus", "to-bakan"):
            assert re.search(rf"\b{label} 4 2 {share} 100\.0% {share} [+-]\d+\.\d points \[", table), label
        assert re.search(rf"mean {share} \[.+?\] {share} \[.+?\] [+-]\d+\.\d points \[", table)
        assert re.search(rf"left out: [\w-]+: {share} before, less than 20 points above the chance level", table)
    for method in ("DFT", "OTR"):
        assert re.search(rf"kept, {method} − SFT: [+-]\d+\.\d points \[", tables[-1])
    for method in ("SFT", "DFT", "OTR"):
        lines = (tmp_path / "runs/one-token-rollout" / method / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_preference_shows_what_losses_pull_on_and_trains_three_from_one_start(run, tiny, tmp_path):
    told = run("preference")
    cells = {heading: words(text) for heading, text in told.items()}
    assert f"gained 0: loss {np.log(2):.4f}" in cells["Four numbers in, a loss out"]
    assert f"gained 5: loss {np.log1p(np.exp(-0.5)):.4f}, reward margin 0.50" in cells["Four numbers in, a loss out"]
    # Pulls at the start, and where the margin is 20 nats, in closed form for β = 0.1.
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    nca = lambda c, j: (sigmoid(-c) - sigmoid(c) / 2, -sigmoid(j) / 2)  # noqa: E731
    expected = {
        "dpo": [(sigmoid(-margin), -sigmoid(-margin)) for margin in (0, 2, 2)],
        "nca": [nca(0, 0), nca(1, -1), nca(-1, -3)],
        "apo_zero": [(sigmoid(c) * sigmoid(-c), -sigmoid(j) * sigmoid(-j)) for c, j in ((0, 0), (1, -1), (-1, -3))],
    }
    for loss, pulls in expected.items():
        (row,) = re.findall(rf"\b{loss}((?: [+-][\d.]+ / [+-][\d.]+){{3}})", cells["What a loss pulls on"])
        found = [float(x) for x in re.findall(r"[+-][\d.]+", row)]
        np.testing.assert_allclose(found, 0.1 * np.ravel(pulls), atol=6e-5)
    for heading, drawings in {"What a loss pulls on": 2, "What moved": 1}.items():
        assert len(re.findall(r"vegaEmbed\(", told[heading])) >= drawings, heading
    logged = {}
    for loss in ("dpo", "nca", "orpo"):
        lines = (tmp_path / "runs/preference" / loss / "metrics.jsonl").read_text().splitlines()
        logged[loss] = [json.loads(line) for line in lines]
        assert [line["step"] for line in logged[loss]] == [1, 2, 3]
        interval = r" [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]"
        assert re.search(rf"\b{loss}(?:{interval}){{3}}", cells["What moved"])
        assert re.search(rf"{loss} − start: [+-]\d+\.\d points \[", cells["What was learnt"])
    assert len(re.findall(r"\b(?:start|dpo|nca|orpo) accuracy 0 2 \d+\.\d% \[", cells["What was learnt"])) == 4
    # At first the policy is its own reference, of the same pairs in both runs; then each goes its own way.
    first, last = ({loss: lines[step] for loss, lines in logged.items()} for step in (0, -1))
    assert first["dpo"]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["nca"]["loss"] == pytest.approx(2 * np.log(2), abs=1e-5)
    assert first["dpo"]["logps/chosen"] == pytest.approx(first["nca"]["logps/chosen"])
    assert len(list((tiny.parent / "cache").rglob("reference-*.bin"))) == 1, "not made once for both"
    assert last["dpo"]["loss"] < np.log(2) and last["dpo"]["logps/chosen"] != last["nca"]["logps/chosen"]
    assert last["orpo"]["nll_loss"] == pytest.approx(-last["orpo"]["logps/chosen"], rel=0.05)
