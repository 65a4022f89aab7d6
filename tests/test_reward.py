"""Reward models against transformers: rewards, gradients of packed pairs, directories in both directions."""

import dataclasses
import itertools
import json
import shutil
import types
from typing import Any

import flax.linen as nn
import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import tiny_policy
from luthier.configs import reward as shipped

from luthier import config as c
from luthier import train, weights
from luthier.cli import main as cli
from luthier.data.batches import build
from luthier.decoding import Sampling, from_source, generate, rewards, score
from luthier.decoding.reward import rewards_of_tokens
from luthier.errors import LuthierError
from luthier.evals.preferences import preferences
from luthier.models import ModelConfig, Transformer
from luthier.objectives import reward, reward_objective
from luthier.optim import optimizers, schedules
from luthier.parallel import Sharder, make_mesh, make_sharder
from luthier.training.reference import load_params
from luthier.training.stages import resolve_stages
from luthier.training.state import init_state, init_variables
from luthier.training.step import jit_step, make_step
from luthier.tuners import bind, merge
from luthier.tuners.lora import lora
from luthier.tuners.reward_head import reward_head

FOLDER = hf_layout.GOLDENS / "reward"
SHARDER = make_sharder(make_mesh(), num_heads=4, num_kv_heads=2)
WORDS = ("<s>", "</s>", "<unk>", "the", "sky", "is", "blue")


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(FOLDER / "rewards.npz"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """transformers' directory, with a tokenizer whose EOS is not the padding."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.npz"))
    for name, content in tiny_hf.word_tokenizer(WORDS).files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def policy(directory):
    return from_source(str(directory))


def texts(golden):
    return [row[:length] for row, length in zip(golden["tokens"], golden["lengths"])]


def wide(variables):
    return jax.tree.map(lambda x: x.astype(jnp.float32), variables)


def language_model(policy):
    """(bound, variables) of the same body with a tied language head, and the reward's head as a tuner."""
    config = dataclasses.replace(policy.bound.model.config, reward=False, tie_embeddings=True)
    params = dict(policy.variables["params"])
    variables = wide({"reward": {"head": params.pop("head")}, "params": params})
    return bind(Transformer(config, remat="none"), [reward_head()]), variables


def batch_of(rows, scores=None):
    """Rows of (segment id, text, scores) as the pipeline makes them; all but the first two tokens are targets."""
    shape = len(rows), max(sum(len(text) for _, text in row) for row in rows) + 3
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros(shape, np.int32) for name in names} | {"loss_weights": np.zeros(shape, np.float32)}
    for i, row in enumerate(rows):
        start = 0
        for segment, text in row:
            span, before = slice(start, start + len(text)), slice(start, start + len(text) - 1)
            batch["tokens"][i, span], batch["targets"][i, before] = text, text[1:]
            batch["segment_ids"][i, span], batch["positions"][i, span] = segment, np.arange(len(text))
            batch["loss_weights"][i, start + 1 : start + len(text) - 1] = 1
            start += len(text)
    if scores is not None:
        batch["scores"] = np.asarray(scores, np.float32)[np.arange(len(rows))[:, None], batch["segment_ids"]]
    return {**batch, "token_ids": np.arange(np.prod(shape), dtype=np.int32).reshape(shape)}


def test_rewards_equal_transformers(golden, policy):
    found = rewards_of_tokens(policy, texts(golden), batch_size=2)
    np.testing.assert_allclose(found, golden["rewards"], atol=1e-5)


def test_the_gradient_of_packed_pairs_equals_torchs(golden, policy):
    a, b, c, d = texts(golden)
    batch = batch_of([[(1, a), (2, b), (3, c), (4, d)]])
    objective, (bound, variables) = reward_objective.make(reward.bradley_terry(), 2, Sharder()), language_model(policy)

    @jax.jit
    def run(variables):
        loss = lambda v: objective.sums(bound, v, batch, jax.random.key(0))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(variables)

    (total, metrics), gradient = run(variables)
    assert objective.count(batch) == 2 and metrics["accuracy"] == (2, 2)
    np.testing.assert_allclose(total / 2, golden["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_reward"][0] / 2, golden["rewards"].mean(), atol=1e-6)
    head, query = gradient["reward"]["head"]["kernel"], gradient["params"]["layers"]["attention"]["q"]["kernel"]
    np.testing.assert_allclose(head / 2, golden["gradient/score.weight"].T, atol=1e-6)
    theirs = golden["gradient/model.layers.0.self_attn.q_proj.weight"].T
    np.testing.assert_allclose(query[0] / 2, theirs, atol=1e-6)


def test_four_steps_equal_trl(policy):
    """TRL's real `RewardTrainer`, margins and centring included (goldens/make_trl_reward.py)."""
    expected = dict(np.load(hf_layout.GOLDENS / "trl_reward.npz"))
    bound, loss = policy.bound, reward.bradley_terry(margin=True, centring=0.01)
    optimizer = optimizers.adamw(schedules.constant(4, peak=1e-3), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    state = init_state({"params": wide(policy.variables["params"])}, optimizer, SHARDER)
    step = jit_step(make_step(bound, reward_objective.make(loss, 2, SHARDER), optimizer), state)
    log = []
    for ids, margins in zip(expected["input_ids"], expected["margins"]):
        answers = [row[row != bound.model.config.pad_token_id] for row in ids]
        scores = np.stack([np.zeros_like(margins), margins, np.zeros_like(margins)], axis=1)  # of segments 0, 1, 2
        rows = [[(1, chosen), (2, rejected)] for chosen, rejected in zip(*np.split(np.array(answers, object), 2))]
        batch = {name: widened(x, 32) for name, x in batch_of(rows, scores).items() if name != "token_ids"}
        state, metrics = step(state, {}, batch)
        log.append({key: float(value) for key, value in metrics.items()})
    names = {"loss": "losses"} | {name: f"logged/{name}" for name in ("mean_reward", "margin", "accuracy")}
    for ours, theirs in names.items():
        np.testing.assert_allclose([m[ours] for m in log], expected[theirs], rtol=1e-5, atol=1e-5, err_msg=ours)
    for name in (key.removeprefix("norm/") for key in expected if key.startswith("norm/")):
        params = state.trainable["params"]
        weight = params["head"]["kernel"].T if name == "score.weight" else hf_layout.hf_leaf(params, name)
        weight = np.asarray(weight).ravel()
        some = weight[:: max(1, weight.size // 64)][:64]
        np.testing.assert_allclose(some, expected[f"slice/{name}"], rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(np.linalg.norm(weight.astype(float)), expected[f"norm/{name}"], rtol=1e-5)


def widened(array, length):
    """Rows with zeros behind them, so that every step has one shape."""
    return np.pad(array, ((0, 0), (0, length - array.shape[1])))


@dataclasses.dataclass(frozen=True)
class Table:
    """A model whose hidden states are given, `[B, T, E]`; rewards and logits are its first and its other numbers."""

    model: Any
    tuners: tuple = (reward_head(),)

    def hidden(self, variables, batch, rngs=None):
        return variables, None

    def head(self, variables):
        return {}

    def unembed(self, variables, hidden):
        return hidden[..., :1] if self.tuners else hidden[..., 1:]


def test_labels_rankings_margins_and_nll(golden):
    """Rewards are read at the ends of answers that NumPy finds; the NLL is a mean over the whole batch's tokens."""
    scores = np.array([[0, 0.9, 0.2, 0.4, 0.1], [0, 0.7, 0.6, 0, 0]], np.float32)
    a, b, c, d = texts(golden)
    batch = batch_of([[(1, a), (2, b), (3, c), (4, d)], [(1, c), (2, d)]], scores)
    config = tiny_policy.config(pad_token_id=2, vocab_size=64)
    bound = Table(types.SimpleNamespace(config=config))
    states = np.random.default_rng(0).normal(size=(*batch["tokens"].shape, 65)).astype(np.float32)
    ends = [[8, 22, 28, 38], [5, 15]]  # the fourth text ends with padding
    r = [states[row, end, 0] for row, end in enumerate(ends)]
    pairs = np.array([r[0][:2], r[0][2:], r[1]]).T
    each = np.concatenate(r)
    ranked = np.array([r[0], [*r[1], 0, 0]]), scores[:, 1:], np.array([[True] * 4, [True, True, False, False]])
    logprob = jax.nn.log_softmax(states[..., 1:])
    logprob = np.take_along_axis(np.asarray(logprob), batch["targets"][..., None], axis=-1)[..., 0]
    chosen = (batch["loss_weights"] > 0) & (batch["segment_ids"] % 2 == 1)
    of_answer = lambda row, k: logprob[row][chosen[row] & (batch["segment_ids"][row] == k)].sum()  # noqa: E731
    nll = -jnp.array([of_answer(0, 1), of_answer(0, 3), of_answer(1, 1)]) * 3 / chosen.sum()
    for loss, inputs, answers in (
        (reward.bradley_terry(margin=True), reward.RewardPairs(*pairs, jnp.array([0.7, 0.3, 0.1])), 2),
        (reward.preference_pretraining(nll_weight=0.5), reward.RewardPairs(*pairs, chosen_nll=nll), 2),
        (reward.binary_discrimination(), reward.RewardLabels(each, jnp.array([1, 0, 0, 0, 1, 1], bool)), 1),
        (reward.ranking(), reward.RewardRankings(*map(jnp.asarray, ranked)), 4),
    ):
        objective = reward_objective.make(loss, answers, Sharder())

        def run(states, batch, inputs, objective=objective, loss=loss):
            whole = objective.prepare(batch)
            parts = [jax.tree.map(lambda x, row=row: x[row : row + 1], (states, whole)) for row in (0, 1)]
            sums = [objective.sums(bound, *part, jax.random.key(0))[0] for part in parts]
            return sum(sums), objective.count(batch), jnp.sum(loss(inputs)[0])

        total, count, expected = jax.jit(run)(states, batch, inputs)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert count == len(inputs[0])


def test_a_tuned_head_becomes_a_directory_and_comes_back(golden, policy, tmp_path):
    """LoRA and head, merged: transformers' names and config, and the same rewards when it is read."""
    bound, variables = language_model(policy)
    both = bind(bound.model, [lora(rank=2), reward_head()])
    shapes = nn.unbox(jax.eval_shape(both.init, jax.random.key(0)))["lora"]
    made = {**variables, "lora": jax.tree.map(lambda x: jnp.full(x.shape, 0.05), shapes)}
    weights.export(tmp_path / "made", bound.model.config, merge(both, made), policy.tokenizer, dtype=np.float32)
    tuned = dataclasses.replace(policy, bound=both, variables=made)
    expected = rewards_of_tokens(tuned, texts(golden), batch_size=2)
    assert np.abs(expected - golden["rewards"]).max() > 0.1
    back = from_source(str(tmp_path / "made"))
    np.testing.assert_allclose(rewards_of_tokens(back, texts(golden), batch_size=2), expected, atol=1e-5)

    weights.export(tmp_path / "same", policy.bound.model.config, policy.variables["params"], policy.tokenizer)
    assert (tmp_path / "same" / "model.safetensors").stat().st_size > 0
    ours, theirs = (hf_layout.read_safetensors(f / "model.safetensors") for f in (tmp_path / "same", FOLDER))
    assert ours.keys() == theirs.keys() and "score.weight" in ours
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    for folder in ("made", "same"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        theirs = json.loads((FOLDER / "config.json").read_text())
        same = ("architectures", "id2label", "label2id", "pad_token_id", "tie_word_embeddings", "model_type")
        assert {key: config[key] for key in same} == {key: theirs[key] for key in same}


def test_a_head_starts_where_the_model_has_one(policy):
    fresh = {"reward": {"head": {"kernel": jnp.zeros((32, 1))}}}
    own = reward_head().start({**policy.variables, **fresh})["reward"]["head"]["kernel"]
    assert own.dtype == jnp.float32
    np.testing.assert_array_equal(own, policy.variables["params"]["head"]["kernel"].astype(jnp.float32))
    assert reward_head().start({**language_model(policy)[1], **fresh}) == fresh


def test_score_reward_brings_each_record_back(policy, directory, tmp_path, capsys):
    records = [{"id": 1, "prompt": "the sky", "completion": " is blue"}, {"prompt": "the", "completion": " sky"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["score", f"--model={directory}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
    assert cli.main([*words, "--reward"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [{key: x for key, x in record.items() if key != "reward"} for record in found] == records
    ids = [[WORDS.index(word) for word in text.split()] for text in ("the sky is blue </s>", "the sky </s>")]
    expected = rewards_of_tokens(policy, ids)
    np.testing.assert_allclose([record["reward"] for record in found], expected, atol=1e-6)
    assert cli.main(words) == 2
    assert "luthier score --reward" in capsys.readouterr().err


def test_held_out_pairs_are_ranked_by_reward_and_by_likelihood(policy, directory, tmp_path, capsys):
    pairs = [
        {"prompt": "the sky", "chosen": f" {a}", "rejected": f" {b}"}
        for a, b in itertools.permutations(("is blue", "blue", "the", "is sky is", "sky"), 2)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[0] | {"rejected": pairs[0]["chosen"]}]))
    reward_of = lambda text: rewards(policy, [{"prompt": "the sky", "completion": text}])[0]  # noqa: E731
    gaps = [reward_of(pair["chosen"]) - reward_of(pair["rejected"]) for pair in pairs]
    found = preferences(policy, label="p", data=str(data))
    assert found.n == 20 and found.value == np.mean(np.array(gaps) > 0) == 0.5 and found.metrics["left_out"] == 1
    assert [record["score"] for record in found.records] == [float(gap > 0) for gap in gaps]
    larger = [pair["chosen" if gap > 0 else "rejected"] for pair, gap in zip(pairs, gaps)]
    assert [record["completion"] for record in found.records] == larger
    assert cli.main(["evaluate", f"--model={directory}", "--task=preferences", f"--task.data={data}"]) == 0
    assert "50.0%" in capsys.readouterr().out
    with pytest.raises(LuthierError, match="not divided by tokens"):
        preferences(policy, label="p", data=str(data), normalise="tokens")

    model, variables = language_model(policy)
    writer = dataclasses.replace(policy, bound=bind(model.model), variables={"params": variables["params"]})
    end = WORDS[1]  # an answer of text ends with EOS, in training too
    for normalise in ("none", "tokens"):
        found = preferences(writer, label="p", data=str(data), normalise=normalise)
        of_answer = {}
        for text in {pair["chosen"] for pair in pairs}:
            (scored,) = score(writer, [{"prompt": "the sky", "completion": f"{text} {end}"}])
            of_answer[text] = scored.logprob / (len(scored.token_ids) if normalise == "tokens" else 1)
        gaps = [of_answer[pair["chosen"]] - of_answer[pair["rejected"]] for pair in pairs]
        assert [record["score"] for record in found.records] == [float(gap > 0) for gap in gaps]
        np.testing.assert_allclose([np.subtract(*r["values"]) for r in found.records], gaps, atol=1e-4)

    ranked = {"prompt": "the sky", "completions": [" blue", " is", " sky"], "scores": [2, 1, 1]}
    (tmp_path / "ranked.jsonl").write_text(json.dumps(ranked) + "\n")
    found = preferences(policy, label="p", data=str(tmp_path / "ranked.jsonl"))
    better, *others = map(reward_of, ranked["completions"])
    assert found.value == np.mean([better > other for other in others])  # the equal two are not compared


def test_what_a_reward_model_cannot_do(policy):
    other = dataclasses.replace(policy, bound=bind(Transformer(tiny_policy.config())))
    for ask, message in (
        (lambda: generate(policy, ["the"], Sampling(max_new_tokens=1)), "writes nothing"),
        (lambda: score(policy, [{"prompt": "the", "completion": "sky"}]), "writes nothing"),
        (lambda: rewards(other, [{"prompt": "the", "completion": " sky"}]), "gives no reward"),
        (lambda: rewards_of_tokens(policy, [[1] * 65]), "pair 0: 65 tokens"),
    ):
        with pytest.raises(LuthierError, match=message):
            ask()
    config = json.loads((FOLDER / "config.json").read_text())
    with pytest.raises(LuthierError, match="classifier of 3 labels"):
        ModelConfig.from_hf({**config, "id2label": {"0": "a", "1": "b", "2": "c"}})


def test_a_head_alone_is_an_adapter_that_merges(golden, policy, tmp_path):
    bound, variables = language_model(policy)
    weights.export(tmp_path / "base", bound.model.config, variables["params"], policy.tokenizer)
    adapter = weights.Adapter("reward_head", {"std": 0.02}, variables["reward"])
    weights.write_adapter(tmp_path / "head", adapter, base=str(tmp_path / "base"), config=bound.model.config)
    assert from_source(str(tmp_path / "head")).bound.is_reward_model
    with pytest.raises(LuthierError, match="luthier export --merge"):
        load_params(
            str(tmp_path / "head"), bind(bound.model.clone(sharder=SHARDER)), weights.describe(tmp_path / "head")
        )
    assert cli.main(["export", f"--model={tmp_path}/head", f"--output={tmp_path}/whole", "--merge"]) == 0
    found = rewards_of_tokens(from_source(str(tmp_path / "whole")), texts(golden), batch_size=2)
    np.testing.assert_allclose(found, golden["rewards"], atol=1e-5)


def recipe(source, data, **changes):
    stage = {
        "data": c.data(str(data)),
        "steps": 16,
        "batch_size": 2,
        "sequence_length": 32,
        "tuners": (c.spec("lora", rank=2), c.spec("reward_head")),
        "objective": c.spec("bradley_terry"),
        "schedule": c.spec("constant", peak=1e-2),
    }
    options = {"logging": c.logging(tensorboard=False), "checkpoint": c.checkpoint(every=0)}
    return c.recipe(model=c.model(str(source), remat="none"), stages=(c.stage(**stage | changes),), **options)


def test_a_recipe_leaves_a_reward_model(policy, tmp_path):
    """Pairs train LoRA and a head; final/ is a classifier's directory, which is scored and trained on."""
    bound, variables = language_model(policy)
    weights.export(tmp_path / "base", bound.model.config, variables["params"], policy.tokenizer)
    pairs = [{"prompt": "the sky", "chosen": f" is {x}", "rejected": f" the {x}"} for x in ("blue", "sky", "is")] * 2
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = recipe(tmp_path / "base", tmp_path / "pairs.jsonl")
    with made.unlocked():
        made.evaluations = (c.spec("preferences", label="pairs", data=str(tmp_path / "pairs.jsonl")),)
    run = train(made, tmp_path / "work")
    assert run.evaluations.keys() == {"after-pairs"}  # before training there is no head
    assert run.evaluations["after-pairs"].value == 1
    asked = [{"prompt": pair["prompt"], "completion": pair[side]} for side in ("chosen", "rejected") for pair in pairs]
    saved = from_source(str(tmp_path / "work"))
    assert saved.bound.model.config.reward and not saved.bound.tuners
    chosen, rejected = np.split(np.array(rewards(saved, asked, batch_size=2)), 2)
    assert np.mean(chosen - rejected) > 0.5
    losses = [record["loss"] for record in run.metrics]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) / 2 and "accuracy" in run.metrics[-1]

    shape = saved.bound.model.config
    again = recipe(tmp_path / "work", tmp_path / "pairs.jsonl", tuners=())
    (stage,) = resolve_stages(again, Transformer(shape))
    assert stage.train == ("params",) and stage.batching == (2, False, False)
    for changes, message in (
        ({"objective": c.spec("preference_pretraining")}, "probabilities too"),
        ({"objective": c.spec("dpo")}, "no probabilities"),
    ):
        with pytest.raises(LuthierError, match=message):
            resolve_stages(recipe("model", "data", **changes), Transformer(shape))
    with pytest.raises(LuthierError, match="'perplexity' asks"):
        other = recipe("model", "data")
        with other.unlocked():
            other.evaluations = (c.spec("perplexity", label="p", data="data"),)
        resolve_stages(other, Transformer(tiny_policy.config()))
    with pytest.raises(LuthierError, match="reward_head"):
        resolve_stages(recipe("model", "data", tuners=()), Transformer(tiny_policy.config()))


@pytest.mark.parametrize("name", shipped.OBJECTIVES)
def test_every_shipped_loss_fits_its_records(name):
    made, shape = shipped.get_config(name), tiny_policy.config(num_hidden_layers=1)
    for stage, resolved in zip(made.stages, resolve_stages(made, Transformer(shape))):
        data = c.data(stage.data.source, answers=stage.data.answers, limit=20)
        options = {
            "sequence_length": stage.sequence_length,
            "batch_size": 2,
            "seed": 0,
            "answers": resolved.batching.answers,
        }
        batches = build(data, tokenizer=tiny_policy.tokenizer(), **options)
        assert batches.has_scores >= resolved.batching.scores
        assert int(resolved.objective().count(batches.rows(0))) > 0


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama_gqa_tied", "gemma2", "gemma3_text"])
def test_transformers_reads_what_we_write(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, params = hf_layout.load(hf_layout.GOLDENS / "families" / family)
    bound = bind(Transformer(config, remat="none"), [reward_head(std=0.3)])
    variables = init_variables(bound, SHARDER, 0, {"params": params})
    weights.export(tmp_path, config, merge(bound, variables), None, dtype=np.float32)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(theirs).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    rows = np.random.default_rng(0).integers(3, 128, (3, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(rows)).logits[:, 0].numpy()
    policy = dataclasses.replace(tiny_policy.policy(), bound=bound, variables=variables)
    np.testing.assert_allclose(rewards_of_tokens(policy, list(rows)), expected, atol=1e-5)
