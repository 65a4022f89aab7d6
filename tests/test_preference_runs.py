"""Recipes of preference losses as a user runs them."""

import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy
import tiny_run
from etils import epath
from luthier.configs import preference
from safetensors.numpy import load_file, save_file

import luthier
from luthier import config as c
from luthier.config import resolve
from luthier.data.batches import build
from luthier.decoding import from_source
from luthier.decoding.score import score_tokens
from luthier.errors import LuthierError
from luthier.models import Transformer
from luthier.objectives.preference import Ranked, objective, ranked
from luthier.training import aot, reference_cache, run
from luthier.training.run import config_sharder, dry_run
from luthier.training.stages import resolve_stages

ROOT = pathlib.Path(__file__).parents[1]

PAIRS = [
    {"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a - b}"} for a in range(4) for b in (1, 2, 3)
]
# A question and two answers, of which the better one depends on what the system message asks for.
CONTEXTS = [("Be brief.", "Blue.", "It is blue."), ("Be polite.", "It is blue.", "Blue.")]
ASKED = [
    {
        "prompt": [{"role": "system", "content": context}, {"role": "user", "content": "Sky?"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for context, chosen, rejected in CONTEXTS
]
LABELS = [{"prompt": x["prompt"], "completion": x["chosen"], "label": bool(i % 2)} for i, x in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    tiny_run.write_run(folder, "", num_hidden_layers=1)
    for name, records in {"pairs": PAIRS, "labels": LABELS, "contexts": ASKED}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def recipe(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))

    def made(data="pairs", objective=None, *, steps=3, answers=2, **options):
        section = c.data(f"{folder}/{data}.jsonl", answers=answers)
        options = {"steps": steps, "batch_size": 2, "sequence_length": 64, **options}
        stage = c.stage(data=section, objective=objective or c.spec("dpo"), clip_norm=0.0, **options)
        return c.recipe(
            model=c.model(f"{folder}/model", remat="none"),
            stages=(stage,),
            checkpoint=c.checkpoint(every=0),
            logging=c.logging(tensorboard=False),
        )

    return made


def losses(recipe):
    return [metrics["loss"] for metrics in luthier.train(recipe).metrics]


def test_a_cached_reference_is_made_once_and_changes_nothing(recipe, tmp_path, monkeypatch):
    rate = c.spec("constant", peak=1e-2)
    expected = losses(recipe(schedule=rate))
    assert abs(expected[0] - np.log(2)) < 1e-6 and len(set(expected)) == 3
    np.testing.assert_allclose(losses(recipe(schedule=rate, cache_reference=True)), expected, atol=1e-6)
    (file,) = (tmp_path / "cache").rglob("reference-*.bin")
    whole = file.read_bytes()
    made = []
    write = reference_cache._write
    monkeypatch.setattr(reference_cache, "_write", lambda *arguments: made.append(1) or write(*arguments))
    short = recipe(schedule=rate, cache_reference=True, steps=1)
    assert losses(short) == pytest.approx(expected[:1], abs=1e-6) and not made
    file.write_bytes(whole[:-8])
    assert losses(short) == pytest.approx(expected[:1], abs=1e-6)
    assert made and file.read_bytes() == whole


def test_a_stopped_run_with_a_reference_that_follows_goes_on_to_the_same_bits(recipe, tmp_path):
    made = recipe(sync_reference=0.6, sync_every=2, steps=4, schedule=c.spec("constant", peak=1e-2))
    with made.unlocked():
        made.checkpoint = c.checkpoint(every=1, keep_last=4)
    run = luthier.train(made, tmp_path / "run")
    model = tmp_path / "run" / "final" / "model.safetensors"
    whole, following = model.read_bytes(), [metrics["loss"] for metrics in run.metrics]
    fixed = recipe(steps=4, schedule=c.spec("constant", peak=1e-2))
    expected = losses(fixed)
    assert following[:2] == pytest.approx(expected[:2]) and abs(following[2] - expected[2]) > 1e-4
    for step in (2, 3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "sft" / str(step))
    shutil.rmtree(tmp_path / "run" / "final")
    again = luthier.train(made, tmp_path / "run")
    assert [metrics["loss"] for metrics in again.metrics] == following and model.read_bytes() == whole


def test_a_stopped_run_with_a_cached_reference_goes_on_to_the_same_bits(recipe, tmp_path):
    """With the file of before the first step, and without it: then the start weights are asked once more."""
    made = recipe(cache_reference=True, steps=4, schedule=c.spec("constant", peak=1e-2), ema=0.9)
    with made.unlocked():
        made.checkpoint = c.checkpoint(every=1, keep_last=4)
    whole, work = tmp_path / "whole", tmp_path / "run"
    luthier.train(made, whole)
    (file,) = (tmp_path / "cache").rglob("reference-*.bin")
    reference = file.read_bytes()
    for is_there in (True, False):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        for place in ("checkpoints/sft/3", "checkpoints/sft/4", "final"):
            shutil.rmtree(work / place)
        if not is_there:
            file.unlink()
        luthier.train(made, work)
        tiny_run.assert_same_run(work, whole)
        assert file.read_bytes() == reference


def by_luthier(folder, pairs):
    return [one.logprob for one in score_tokens(from_source(str(folder)), pairs)]


def by_transformers(folder, pairs):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for prompt, answer in pairs:
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1).numpy()
        found.append(sum(logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
    return found


@pytest.mark.parametrize(
    "scored, cached",
    [(by_luthier, (False, True)), pytest.param(by_transformers, (False,), marks=pytest.mark.parity)],
    ids=["luthier", "transformers"],
)
def test_a_reference_of_its_own_is_asked_in_the_same_context(recipe, folder, tmp_path, scored, cached):
    """The first step's rewards are β(policy − reference), of two models that are scored apart, on texts by hand."""
    shutil.copytree(folder / "model", tmp_path / "other")
    file, encode = tmp_path / "other" / "model.safetensors", tiny_policy.tokenizer().encode
    save_file({name: x * (12 if x.ndim > 1 else 1) for name, x in load_file(file).items()}, file, {"format": "pt"})
    asked = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    texts = [(asked.format(context), f"{answer}<|im_end|>") for context, *sides in CONTEXTS for answer in sides]
    pairs = [(encode(prompt), encode(answer)) for prompt, answer in texts]
    policy, reference = (np.reshape(scored(place, pairs), (2, 2)) for place in (folder / "model", tmp_path / "other"))
    chosen, rejected = 0.5 * (policy - reference).T
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": policy[:, 0].mean(),
        "loss": np.logaddexp(0, rejected - chosen).mean(),
    }
    assert abs(expected["rewards/margins"]) > 0.1
    for is_cached in cached:
        made = recipe(
            "contexts",
            c.spec("dpo", beta=0.5),
            steps=1,
            batch_size=1,
            sequence_length=256,
            reference=str(tmp_path / "other"),
            cache_reference=is_cached,
        )
        (found,) = luthier.train(made).metrics
        # A sum of 50 nats is rounded to 4e-6, and a margin is the difference of four such sums.
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5), is_cached


@pytest.mark.parametrize(
    "options, says",
    [
        ({"objective": c.spec("aot"), "micro_batches": 2}, "stage sft: micro_batches: 'aot' of an example depends on"),
        ({"objective": c.spec("kto"), "micro_batches": 2}, "stage sft: micro_batches: 'kto' of an example depends on"),
        (
            {"objective": c.spec("clha"), "micro_batches": 2},
            "stage sft: micro_batches: 'clha' of an example",
        ),
        ({"sync_every": 64}, "stage sft: sync_every: no reference follows the policy. Set sync_reference too"),
        ({"answers": 4}, "stage sft: data.answers: 'dpo' does not read answers=4. Leave it out"),
        ({"objective": c.spec("ranking"), "answers": 4}, "stage sft: objective: the loss is of rewards"),
        ({"objective": c.spec("bco", shifted=True)}, "stage sft: objective: no recipe keeps the running mean"),
        ({"objective": c.spec("orpo"), "cache_reference": True}, "stage sft: cache_reference: 'orpo' compares with no"),
        ({"objective": c.spec("orpo"), "reference": "other"}, "stage sft: reference: 'orpo' compares with no"),
        (
            {"sync_reference": 0.6, "cache_reference": True},
            "stage sft: sync_reference: the reference follows the policy",
        ),
        ({"sync_reference": 0.6, "tuners": (c.spec("lora"),)}, "sync_reference: the mean of two tuners is not"),
        (
            {"cache_reference": True, "transforms": (c.spec("masked_thought"),)},
            "stage sft: cache_reference: transforms change the tokens",
        ),
        ({"sync_reference": 2.0}, "stage sft: sync_reference=2"),
        ({"objective": c.spec("infonca", temperature=1.0)}, "needs scores or labels and the data have none"),
        ({"objective": c.spec("sft")}, "preference"),
        ({"objective": c.spec("wpo", loss=c.spec("sft"))}, "objective.loss: it is not a loss of whole answers"),
    ],
)
def test_what_a_recipe_cannot_give_is_said_before_the_first_step(options, says, recipe):
    with pytest.raises(LuthierError) as error:
        luthier.train(recipe(**options))
    assert says in str(error.value)


@pytest.mark.parametrize("what", ["reference", "teacher"])
def test_a_second_model_with_other_tokens_is_refused(recipe, folder, tmp_path, what):
    """Named as what it is; one with the same tokens is not."""
    shutil.copytree(folder / "model", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(tokenizer))

    def made(source):
        if what == "reference":
            return recipe(reference=str(source), steps=1)
        return recipe("data", c.spec("distillation", teacher=str(source)), steps=1)

    run.prepare(made(folder / "model"), epath.Path(tmp_path / "run"))
    with pytest.raises(LuthierError) as error:
        run.prepare(made(tmp_path / "other"), epath.Path(tmp_path / "run"))
    assert f"stage sft: {what} {tmp_path / 'other'}: its token '" in str(error.value)
    assert str(error.value).endswith(f"Take a {what} with the same tokenizer.")


def test_a_cached_reference_is_named_by_how_it_came_about(recipe, folder, tmp_path):
    """At a second stage: by the model's section, and by the weights that the first stage compared with, while there."""
    other, data = tmp_path / "other", [types.SimpleNamespace(fingerprint="data")] * 2
    shutil.copytree(folder / "model", other)

    def identity(**model):
        made = recipe(reference=str(other), name="first")
        with made.unlocked():
            made.stages = (*made.stages, recipe(name="second", cache_reference=True).stages[0])
            made.model.update(model)
        shape = tiny_policy.config(num_hidden_layers=1)
        stages = resolve_stages(made, Transformer(shape, sharder=config_sharder(made, shape)))
        about = types.SimpleNamespace(fingerprint="model")
        return run._reference_identity(
            types.SimpleNamespace(config=made, about=about, workdir="run", stages=stages, batches=data), 1
        )

    first = identity()
    assert identity() == first != identity(dropout=0.1)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert identity() not in (first, shutil.rmtree(other) or identity())


def test_every_term_of_the_shipped_clha_acts_in_every_batch():
    """Of answers that are all as likely: pairs are apart by the margin, and first answers have positive scores."""
    stage = c.load(f"{ROOT / 'configs' / 'preference.py'}:clha").stages[1]
    options = {"sequence_length": stage.sequence_length, "batch_size": stage.batch_size, "seed": 0, "answers": 4}
    batches = build(stage.data, tokenizer=tiny_policy.tokenizer(), **options)
    whole = resolve(stage.objective, "objective")()
    contrast = ranked.clha(sft_weight=0.0)

    @jax.jit
    def terms(rows):
        tokens = objective.targets_of(rows, 4)
        scores = objective.by_answer(rows["scores"] * (rows["loss_weights"] > 0), rows["segment_ids"], answers=4)
        scores, present = scores / jnp.maximum(tokens, 1), tokens > 0
        inputs = Ranked(-1.0 * tokens, None, scores, tokens, present, jnp.all(present, axis=1))
        apart = jnp.sum(contrast(inputs)[0])
        return apart, jnp.sum(whole(inputs)[0]) - apart

    for step in range(stage.steps):
        rows = batches.rows(step)
        apart, imitated = terms({name: rows[name] for name in ("scores", "loss_weights", "segment_ids")})
        assert apart > 0 and imitated > 0, step


@pytest.mark.parametrize("name", preference.OBJECTIVES)
def test_every_shipped_loss_fits_its_records_and_makes_a_step(name):
    """The whole step of `configs/preference.py:NAME`, its data tokenised, traced on a tiny model."""
    recipe = c.load(f"{ROOT / 'configs' / 'preference.py'}:{name}")
    shape, stage = tiny_policy.config(num_hidden_layers=1), recipe.stages[1]
    step, arguments, _ = aot.abstract_step(recipe, stage, shape, config_sharder(recipe, shape), jnp.float32)
    _, metrics = jax.eval_shape(step, *arguments)
    assert {"loss", "grad_norm"} <= metrics.keys()
    resolved = resolve_stages(recipe, Transformer(shape))[1]
    batches = build(
        stage.data,
        tokenizer=tiny_policy.tokenizer(),
        sequence_length=stage.sequence_length,
        batch_size=4,
        seed=0,
        answers=resolved.batching.answers,
        mismatched=resolved.batching.mismatched,
    )
    assert batches.counts["examples"] == 1000 and batches.has_scores >= resolved.batching.scores
    fields = set(arguments[2]) - {"scores", "reference_logps"}
    assert fields == set(batches.rows(0)) - {"scores"}


def test_labelled_records_come_with_an_answer_to_another_prompt(recipe):
    batches = dry_run(recipe("labels", c.spec("kto")))
    assert batches.answers == 2 and batches.has_scores
    assert dry_run(recipe("labels", c.spec("apo_zero_unpaired"))).answers == 1
