"""The command line: quick where it can be, each subcommand on a tiny model, exit codes."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy
import tiny_run

from luthier import weights
from luthier.cli import generate as generate_command
from luthier.cli import main as cli
from luthier.decoding import Sampling, from_source
from luthier.models import Transformer
from luthier.tuners import bind

STAGE = 'c.stage(data=DATA, steps=3, batch_size=2, sequence_length=64, tuners=(c.spec("lora", rank=2),))'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny_policy.config()
    params = nn.meta.unbox(jax.jit(bind(Transformer(config)).init)(jax.random.key(0)))["params"]
    weights.export(folder, config, params, tiny_policy.tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config file, workdir) of a finished run with an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run.write_run(folder, STAGE)
    spec = f'c.spec("verifier", label="sums", data="{folder}/data.jsonl", limit=8, max_new_tokens=4)'
    config.write_text(config.read_text().replace("checkpoint=", f"evaluations=({spec},),\n        checkpoint="))
    assert cli.main(["train", f"--config={config}", f"--workdir={folder}/work"]) == 0
    return config, folder / "work"


QUICK = {
    "help": (["--help"], 0),
    "train help": (["train", "--help"], 0),
    "version": (["--version"], 0),
    "unknown key": (["train", "--config=CONFIG", "--workdir=w", "--config.stages[0].stepps=3"], 2),
    "no config": (["train", "--config=nowhere.py", "--workdir=w"], 2),
}


@pytest.mark.parametrize("words, code", QUICK.values(), ids=QUICK)
def test_help_and_config_errors_import_nothing_heavy(words, code):
    config = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
    words = [word.replace("CONFIG", str(config)) for word in words]
    program = (
        "import sys, time; start = time.process_time()\n"
        "from luthier.cli.main import main\n"
        f"try: code = main({words!r})\n"
        "except SystemExit as done: code = done.code or 0\n"
        "heavy = [m for m in ('jax', 'flax', 'tensorflow', 'numpy', 'scipy', 'rich', 'etils') if m in sys.modules]\n"
        "print('\\n', code, heavy, time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found, heavy, seconds = done.stdout.splitlines()[-1].split(maxsplit=1)[0], "[]", done.stdout.split()[-1]
    assert int(found) == code and f" {heavy} " in done.stdout.splitlines()[-1]
    assert float(seconds) < 0.5


def test_python_m_luthier():
    done = subprocess.run([sys.executable, "-m", "luthier", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("luthier 0.")


def test_sampling_arguments_are_those_of_sampling():
    known = {f.name: f.default for f in dataclasses.fields(Sampling) if f.name != "stop"}
    assert {name: default for name, _, default, _ in generate_command.SAMPLING} == known


def test_train_writes_model_table_and_report(trained, capsys):
    config, workdir = trained
    assert (workdir / "final" / "adapter_config.json").exists()
    # Once more: everything is there, nothing is trained again.
    lines = (workdir / "metrics.jsonl").read_text()
    assert cli.main(["train", f"--config={config}", f"--workdir={workdir}"]) == 0
    shown = capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == lines
    assert f"report  {workdir / 'report.html'}" in shown and "points" in shown
    assert "<svg" in (workdir / "report.html").read_text()


def test_dry_run_shows_tokens_and_sizes_and_writes_nothing(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", f"--config={trained[0]}", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "completion" in shown and "lora" in shown and "examples 64" in shown
    assert not list(tmp_path.iterdir())


def test_preemption_code_passes_through(trained, tmp_path, monkeypatch):
    from luthier.training import run, signals

    def preempted(*args, **options):
        raise signals.Preempted(7)

    monkeypatch.setattr(run, "train", preempted)
    assert cli.main(["train", f"--config={trained[0]}", f"--workdir={tmp_path}"]) == 75


def test_interruption_is_130(trained, tmp_path, monkeypatch, capsys):
    from luthier.training import run

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert cli.main(["train", f"--config={trained[0]}", f"--workdir={tmp_path}"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(trained, tmp_path, monkeypatch):
    from luthier.training import run

    monkeypatch.setattr(run, "train", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", f"--config={trained[0]}", f"--workdir={tmp_path}"])


def test_a_full_disk_is_one_line_and_keeps_what_was_there(model, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "out.jsonl").write_text("old")
    (tmp_path / ".out.jsonl.partial").symlink_to("/dev/full")
    words = ["score", f"--model={model}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
    assert cli.main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("luthier: error:")]
    assert len(errors) == 1 and "disk is full" in errors[0] and "Free some space" in errors[0]
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_output_to_a_device_leaves_the_device(model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "null").symlink_to("/dev/null")
    assert cli.main(["score", f"--model={model}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/null"]) == 0
    assert (tmp_path / "null").is_symlink()


def test_generate_from_every_source(model, tmp_path, capsys, monkeypatch):
    ask = ["generate", f"--model={model}", "--max_new_tokens=5"]

    def said(*words):
        assert cli.main([*ask, *words]) == 0
        return capsys.readouterr().out

    one = said("--prompt=1 + 2 =")
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 2 =\n"))
    assert said() == one
    (tmp_path / "in.txt").write_text("1 + 2 =\n")
    assert said(f"--input={tmp_path}/in.txt") == one
    (tmp_path / "in.jsonl").write_text('{"prompt": "1 + 2 ="}\n{"prompt": [{"role": "user", "content": "hi"}]}\n')
    first, second = map(json.loads, said(f"--input={tmp_path}/in.jsonl").splitlines())
    assert first["completion"] + "\n" == one and second["prompt"] == [{"role": "user", "content": "hi"}]
    said(f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/deep/out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").open()] == [first, second]
    assert said("--prompt=hi", "--user") == second["completion"] + "\n"
    told, asked = {"role": "system", "content": "S"}, {"role": "user", "content": "hi"}
    records = [{"prompt": [told, asked]}, {"prompt": [asked], "system": "S"}, {"prompt": "hi", "system": "S"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    first, second, third = map(json.loads, said(f"--input={tmp_path}/in.jsonl", "--user").splitlines())
    assert first == second == third and first["prompt"] == [told, asked]
    assert cli.main([*ask, f"--input={tmp_path}/in.jsonl"]) == 2
    assert "in.jsonl:3" in (error := capsys.readouterr().err) and "'system' stands beside" in error


def test_generate_draws_by_seed(model, capsys):
    words = ["generate", f"--model={model}", "--prompt=x", "--max_new_tokens=20", "--temperature=1", "--top_p=0.99"]
    texts = []
    for seed in (0, 0, 1):
        assert cli.main([*words, f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_chat_keeps_the_conversation(model, capsys, monkeypatch):
    from luthier import decoding

    seen, real = [], decoding.generate

    def watched(policy, prompts, sampling):
        seen.append(list(prompts[0]))
        return real(policy, prompts, sampling)

    monkeypatch.setattr(decoding, "generate", watched)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    assert cli.main(["generate", f"--model={model}", "--chat", "--max_new_tokens=4"]) == 0
    assert [[m["role"] for m in messages] for messages in seen] == [["user"], ["user", "assistant", "user"]]
    assert seen[1][1]["content"] in capsys.readouterr().out


def test_score_brings_each_record_back(model, tmp_path):
    pairs = [{"prompt": "1 + 2 =", "completion": " 3", "id": 7}, {"prompt": "", "completion": "abc"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    assert (
        cli.main(["score", f"--model={model}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]) == 0
    )
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    # The first token's log-probability from a plain forward of the whole text.
    policy = from_source(model)
    ids = policy.encode("1 + 2 = 3")
    batch = {
        "tokens": np.asarray([ids]),
        "positions": np.arange(len(ids))[None],
        "segment_ids": np.ones((1, len(ids)), int),
    }
    hidden, _ = policy.bound.hidden(policy.variables, batch)
    logprobs = jax.nn.log_softmax(policy.bound.unembed(policy.variables, hidden))[0]
    count = len(scored[0]["token_ids"])
    expected = [float(logprobs[len(ids) - count - 1 + i, ids[len(ids) - count + i]]) for i in range(count)]
    assert scored[0]["id"] == 7 and scored[0]["token_ids"] == ids[-count:]
    assert scored[0]["logprobs"] == pytest.approx(expected, abs=1e-5)
    assert all(s["logprob"] == pytest.approx(sum(s["logprobs"]), abs=1e-5) for s in scored)
    assert len(scored[1]["token_ids"]) == 3


def test_evaluate_by_task_and_by_config(model, trained, tmp_path, capsys):
    config, workdir = trained
    data = config.parent / "data.jsonl"
    words = ["--task=perplexity", f"--task.data={data}", "--task.limit=4", "--task.train_on=completion"]
    assert cli.main(["evaluate", f"--model={model}", *words, f"--output={tmp_path}"]) == 0
    assert "perplexity" in capsys.readouterr().out
    result = json.loads((tmp_path / "evaluations" / "after-data.json").read_text())
    assert result["n"] == 4 and result["spec"]["train_on"] == "completion"
    assert cli.main(["evaluate", f"--model={workdir}", f"--config={config}"]) == 0
    assert "sums" in capsys.readouterr().out


def test_export_keeps_the_adapter_or_merges_it(trained, tmp_path):
    _, workdir = trained
    assert cli.main(["export", f"--model={workdir}", f"--output={tmp_path}/adapter"]) == 0
    assert (
        cli.main(["export", f"--model={workdir}", f"--output={tmp_path}/whole", "--merge", "--max_shard_gb=1e-4"]) == 0
    )
    half = ["export", f"--model={workdir}", f"--output={tmp_path}/half", "--dtype=bfloat16"]
    assert cli.main(half) == 2 and cli.main([*half, "--merge"]) == 0
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 1
    texts = ["1 + 2 =", "7 + 8 + 9 ="]
    answers = []
    for source in (workdir, tmp_path / "adapter", tmp_path / "whole"):
        policy = from_source(str(source))
        ids = np.asarray([policy.encode(text)[:7] for text in texts])
        batch = {"tokens": ids, "positions": np.tile(np.arange(7), (2, 1)), "segment_ids": np.ones((2, 7), int)}
        answers.append(np.asarray(policy.bound.hidden(policy.variables, batch)[0]))
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_allclose(answers[0], answers[2], atol=1e-5)
    whole, rounded = (weights.load(f"{tmp_path}/{name}").params for name in ("whole", "half"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b, strict=True), whole, rounded)


def test_report_command(trained, capsys):
    assert cli.main(["report", str(trained[1])]) == 0
    assert capsys.readouterr().out.strip() == str(trained[1] / "report.html")
