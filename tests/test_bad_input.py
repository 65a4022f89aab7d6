"""Mistakes: each is one clear line with what, where and the mend, exit 2, and nothing is lost."""

import json
import pathlib
import shutil

import pytest
import tiny_run

from luthier.cli import main as cli

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
QUICKSTART = f"--config={CONFIGS}/quickstart.py"
PAIR = {"prompt": "1 + 1 =", "completion": " 2"}
STAGE = "c.stage(data=DATA, steps=1, batch_size=1, sequence_length=64)"


def _lines(*records):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


def _config(**changes):
    """A change of a model's config.json."""

    def change(model: pathlib.Path):
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _cut(model: pathlib.Path):
    """Half of the weights, as an interrupted copy leaves them."""
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _fewer_rows(model: pathlib.Path):
    """A tokenizer that knows one token more than the embedding has rows."""
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": rows, "content": "<one more>", **flags})
    file.write_text(json.dumps(tokenizer))


CHAT = _lines({"messages": [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]})

# name: (files written beforehand, or a change to a copy of the model; command line, what the one line must
# say). FOLDER is the test's own folder, which holds a tiny model in FOLDER/model and its recipe in FOLDER/config.py.
CASES = {
    "unknown command": ({}, ["trian"], ["invalid choice: 'trian'", "train"]),
    "unknown argument": ({}, ["train", "--workdri=w", QUICKSTART], ["--workdri=w", "Did you mean '--workdir'"]),
    "missing argument": ({}, ["train"], ["--config", "luthier train --help"]),
    "wrong argument type": ({}, ["generate", "--model=m", "--top_k=many"], ["--top_k", "invalid int value: 'many'"]),
    "no workdir": ({}, ["train", QUICKSTART], ["--workdir", "Give --workdir=DIR"]),
    "missing config": (
        {},
        ["train", f"--config={CONFIGS}/quikstart.py", "--workdir=FOLDER/w"],
        ["no such config file", "Did you mean", "quickstart.py"],
    ),
    "config is not Python": (
        {"bad.py": "def get_config():\n  return (\n"},
        ["train", "--config=FOLDER/bad.py", "--workdir=FOLDER/w"],
        ["bad.py:2", "not Python"],
    ),
    "config has no get_config": (
        {"bad.py": "x = 1\n"},
        ["train", "--config=FOLDER/bad.py", "--workdir=FOLDER/w"],
        ["bad.py", "no get_config()"],
    ),
    "unknown config key": (
        {},
        ["train", QUICKSTART, "--workdir=FOLDER/w", "--config.stages[0].step=3"],
        ["--config.stages[0].step", "unknown config key 'step'", "Did you mean 'steps'"],
    ),
    "override without a value": (
        {},
        ["train", QUICKSTART, "--workdir=FOLDER/w", "--config.seed"],
        ["--config.seed", "Write --config.seed=VALUE"],
    ),
    "wrong value type": (
        {},
        ["train", QUICKSTART, "--workdir=FOLDER/w", "--config.stages[0].steps=many"],
        ["--config.stages[0].steps", "expected int, got 'many'"],
    ),
    "no such stage": (
        {},
        ["train", QUICKSTART, "--workdir=FOLDER/w", "--config.stages[3].steps=1"],
        ["--config.stages[3].steps", "there are 1"],
    ),
    "unknown method": (
        {},
        ["train", QUICKSTART, "--workdir=FOLDER/w", "--config.stages[0].objective.name=stf"],
        ["unknown method 'stf'", "Did you mean 'sft'"],
    ),
    "unknown model": (
        {},
        ["generate", "--model=smolm2-135m", "--prompt=hi"],
        ["smolm2-135m", "no such model", "Did you mean 'smollm2-135m'"],
    ),
    "not a model": ({"m.txt": "hi"}, ["generate", "--model=FOLDER/m.txt", "--prompt=hi"], ["m.txt", "not a model"]),
    "unknown model in a config": (
        {},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w", "--config.model.source=FOLDER/nowhere"],
        ["nowhere", "no such model"],
    ),
    "broken JSON on line 17": (
        {"data.jsonl": _lines(*[PAIR] * 16, '{"prompt": ', PAIR)},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w"],
        ["data.jsonl:17"],
    ),
    "missing field": (
        {"data.jsonl": _lines(PAIR, {"prompt": "1"})},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w"],
        ["data.jsonl:2", "completion"],
    ),
    "empty completion": (
        {"data.jsonl": _lines(PAIR, {"prompt": "1", "completion": ""})},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w"],
        ["data.jsonl:2", "empty"],
    ),
    "longer than the sequence": (
        {"data.jsonl": _lines(PAIR, {"prompt": "1" * 100, "completion": "2"})},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w"],
        ["data.jsonl:2", "truncation"],
    ),
    "unsupported model type": (
        {"changed": _config(model_type="mamba")},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w", "--config.model.source=FOLDER/changed"],
        ["changed", "mamba", "llama"],
    ),
    "more tokens than embedding rows": (
        {"changed": _fewer_rows},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w", "--config.model.source=FOLDER/changed"],
        ["the tokenizer has", "the embedding"],
    ),
    "truncated safetensors": (
        {"changed": _cut},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w", "--config.model.source=FOLDER/changed"],
        ["model.safetensors", "truncated"],
    ),
    "template that reaches Python internals": (
        {"data.jsonl": CHAT, "bad.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w", "--config.model.template=FOLDER/bad.jinja"],
        ["data.jsonl:1", "Python internals", "__class__", "model.template"],
    ),
    "full disk": (
        {"in.jsonl": _lines(PAIR), ".out.jsonl.partial": pathlib.Path("/dev/full")},
        ["score", "--model=FOLDER/model", "--input=FOLDER/in.jsonl", "--output=FOLDER/out.jsonl"],
        ["out.jsonl", "disk is full", "Free some space"],
    ),
    "mesh does not divide the devices": (
        {},
        ["train", "--config=FOLDER/config.py", "--workdir=FOLDER/w", "--config.mesh.tensor=3"],
        ["mesh", "3"],
    ),
    "score: missing field": (
        {"in.jsonl": _lines(PAIR, {"prompt": "1"})},
        ["score", "--model=FOLDER/model", "--input=FOLDER/in.jsonl", "--output=FOLDER/out.jsonl"],
        ["in.jsonl:2", "no field 'completion'"],
    ),
    "score: empty completion": (
        {"in.jsonl": _lines(PAIR, {"prompt": "1", "completion": ""})},
        ["score", "--model=FOLDER/model", "--input=FOLDER/in.jsonl", "--output=FOLDER/out.jsonl"],
        ["in.jsonl:2", "completion is empty"],
    ),
    "no such input": (
        {},
        ["score", "--model=FOLDER/model", "--input=FOLDER/no.jsonl", "--output=FOLDER/out.jsonl"],
        ["no.jsonl"],
    ),
    "prompt longer than the context": (
        {},
        ["generate", "--model=FOLDER/model", "--max_new_tokens=600", "--prompt=hi"],
        ["--prompt", "exceed the context of 512"],
    ),
    "sampling out of range": (
        {},
        ["generate", "--model=FOLDER/model", "--top_p=1.5", "--prompt=hi"],
        ["top_p", "at most 1, got 1.5"],
    ),
    "two prompts": ({}, ["generate", "--model=FOLDER/model", "--prompt=a", "--chat"], ["one of --prompt"]),
    "unknown task": (
        {},
        ["evaluate", "--model=FOLDER/model", "--task=perplexty"],
        ["--task", "Did you mean 'perplexity'"],
    ),
    "unknown task option": (
        {},
        ["evaluate", "--model=FOLDER/model", "--task=verifier", "--task.shot=2"],
        ["--task.shot", "Did you mean 'shots'"],
    ),
    "dotted argument elsewhere": ({}, ["report", "w", "--config.seed=1"], ["takes no --config.KEY"]),
    "not a workdir": ({}, ["report", "FOLDER/nowhere"], ["FOLDER/nowhere", "no such workdir"]),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    tiny_run.write_run(folder, STAGE)
    return folder


@pytest.mark.parametrize("files, words, expected", CASES.values(), ids=CASES)
def test_one_clear_line(files, words, expected, tiny, capsys, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tiny / "cache"))
    before = (tiny / "data.jsonl").read_text()
    for name, content in files.items():
        if callable(content):
            shutil.copytree(tiny / "model", tiny / name, dirs_exist_ok=True)
            content(tiny / name)
        elif isinstance(content, pathlib.Path):
            (tiny / name).symlink_to(content)
        else:
            (tiny / name).write_text(content)
    here = lambda text: text.replace("FOLDER", str(tiny))  # noqa: E731
    try:
        code = cli.main([here(word) for word in words])
    finally:
        (tiny / "data.jsonl").write_text(before)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("luthier: error: ")]
    assert code == 2 and len(errors) == 1, errors
    for part in expected:
        assert here(part) in errors[0]
    assert not (tiny / "out.jsonl").exists() and not (tiny / "w" / "metrics.jsonl").exists()


def test_checkpoints_half_written_or_of_another_model(tiny, tmp_path, capsys):
    words = ["train", f"--config={tiny}/config.py", f"--workdir={tmp_path}/w", "--config.checkpoint.every=1"]
    words += ["--config.stages[0].steps=3"]
    assert cli.main(words) == 0
    metrics = (tmp_path / "w" / "metrics.jsonl").read_text()
    last = tmp_path / "w" / "checkpoints" / "sft" / "3"
    largest = max((p for p in last.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "checkpoint is broken" in (said := capsys.readouterr().err) and "going back to step 2" in said
    again = (tmp_path / "w" / "metrics.jsonl").read_text()
    kept = [
        [{k: v for k, v in json.loads(line).items() if "/" not in k} for line in text.splitlines()]
        for text in (metrics, again)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 3

    # The same command with another model: known by its fingerprint, and where nobody kept that by its shapes.
    tiny_run.write_run(tmp_path, STAGE, hidden_size=16)
    for known, parts in [
        (True, ["manifest.json", "fingerprints.model", "Restore them to go on, or give another --workdir"]),
        (False, ["checkpoints/sft/3", "does not fit", "[259, 32] in it and [259, 16] in this", "another --workdir"]),
    ]:
        if not known:
            (tmp_path / "w" / "manifest.json").unlink()
        capsys.readouterr()
        assert cli.main([*words, f"--config.model.source={tmp_path}/model"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("luthier: error: ")]
        assert len(lines) == 1 and all(part in lines[0] for part in parts), lines
        assert (tmp_path / "w" / "metrics.jsonl").read_text() == again


def test_debug_shows_the_traceback():
    from luthier.errors import LuthierError

    with pytest.raises(LuthierError):
        cli.main(["report", "nowhere", "--debug"])
