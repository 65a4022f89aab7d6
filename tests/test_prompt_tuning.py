"""Soft prompts: vectors of a prompt are worth what the embeddings of extra tokens are, packed, trained and decoded."""

import dataclasses
import functools
import json
import shutil
import types

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy
import tiny_run
import tiny_training
from flax.traverse_util import flatten_dict

import luthier
from luthier import config as configs
from luthier import weights
from luthier.data import batches
from luthier.decoding import Policy, Sampling, batching, from_source, generate, score
from luthier.errors import LuthierError
from luthier.models import Transformer
from luthier.objectives import TokenLoss, token_objective
from luthier.objectives.sft import sft
from luthier.training.stages import resolve_stages
from luthier.training.state import init_variables
from luthier.training.step import make_gradients
from luthier.tuners import bind
from luthier.tuners.prompt_tuning import prompt_tuning

LENGTH, PROMPTS = 3, 2
PEFT = hf_layout.GOLDENS / "peft_prompt"
tiny = functools.cache(tiny_policy.policy)


def with_prompts(**options):
    """(a policy with two soft prompts, one whose vocabulary has their vectors as further tokens)."""
    plain = tiny()
    model, params = plain.bound.model, plain.variables["params"]
    vectors = np.random.default_rng(1).standard_normal((LENGTH * PROMPTS, model.config.hidden_size)).astype(np.float32)
    bound = bind(model, [prompt_tuning(length=LENGTH, prompts=PROMPTS, **options)])
    soft = dataclasses.replace(
        plain, bound=bound, variables={"params": params, "prompt": {"inputs": {"vectors": jnp.asarray(vectors)}}}
    )
    wide = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + len(vectors))
    embedding = jnp.concatenate([params["embed"]["embedding"], vectors])
    kernel = jnp.pad(params["head"]["kernel"], ((0, 0), (0, len(vectors))))
    extended = {**params, "embed": {"embedding": embedding}, "head": {"kernel": kernel}}
    return soft, dataclasses.replace(plain, bound=bind(Transformer(wide, remat="none")), variables={"params": extended})


def extra_tokens(policy, number):
    """Tokens of the wide vocabulary that are prompt `number`."""
    first = policy.bound.model.config.vocab_size + number * LENGTH
    return list(range(first, first + LENGTH))


def write_records(folder, count=12):
    files = []
    for task in range(PROMPTS):
        files.append(folder / f"{task}.jsonl")
        rows = [{"prompt": f"{task}{i}" * (1 + i % 3), "completion": f" {i * i}"} for i in range(count)]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def packed(folder, tokenizer, prompt_length, sequence_length):
    """A batch of a mixture of two tasks, each with its own prompt."""
    data = tuple(configs.data(str(file), prompt=task) for task, file in enumerate(write_records(folder)))
    return batches.build(
        data,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=4,
        seed=0,
        prompt_length=prompt_length,
        cache_dir=folder / "cache",
    )


def segments(rows):
    """(tokens, targets, weights, slots) of every example."""
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            mine = rows["segment_ids"][row] == segment
            assert rows["positions"][row][mine].tolist() == list(range(mine.sum()))
            yield tuple(rows[key][row][mine].tolist() for key in ("tokens", "targets", "loss_weights", "prompt_slots"))


def test_every_packed_example_has_its_own_tasks_prompt(tmp_path):
    tokenizer = tiny_policy.tokenizer()
    made = packed(tmp_path, tokenizer, LENGTH, 48)
    found = {}
    for step in range(made.rows_per_epoch // 4):
        rows = made.rows(step)
        assert not (rows["prompt_slots"][rows["segment_ids"] == 0] >= 0).any()
        for tokens, targets, loss_weights, slots in segments(rows):
            text = tokenizer.decode(tokens[LENGTH:])
            task = int(text[0])
            assert slots == [task * LENGTH + i for i in range(LENGTH)] + [-1] * (len(tokens) - LENGTH)
            assert targets[LENGTH - 1 : -1] == tokens[LENGTH:] and not any(loss_weights[:LENGTH])
            found[text] = (tokens[LENGTH:], loss_weights[LENGTH:])
    without = packed(tmp_path, tokenizer, 0, 48)
    assert "prompt_slots" not in without.rows(0) and without.fingerprint != made.fingerprint
    plain = {}
    for step in range(without.rows_per_epoch // 4 + 1):
        rows = without.rows(step) | {"prompt_slots": without.rows(step)["tokens"] * 0}
        plain |= {tokenizer.decode(tokens): (tokens, kept) for tokens, _, kept, _ in segments(rows)}
    assert len(found) >= 12 and all(plain[text] == example for text, example in found.items())


def test_prompts_are_worth_tokens(tmp_path):
    """Loss and gradients of packed examples, in weights and prompts, are those of the wide vocabulary."""
    soft, wide = with_prompts()
    rows = packed(tmp_path, soft.tokenizer, LENGTH, 48).rows(0)
    size = soft.bound.model.config.vocab_size
    slots = rows["prompt_slots"]
    spelled = {key: x for key, x in rows.items() if key != "prompt_slots"}
    spelled["tokens"] = np.where(slots >= 0, size + slots, rows["tokens"])
    # The tokens that only the wide vocabulary has are left out of its softmax.
    loss_fn = lambda logits, tok, keys: sft().token_fn(logits[:, :size], tok, keys)  # noqa: E731
    objective = token_objective(TokenLoss(loss_fn), tiny_training.SHARDER)

    def run(policy, batch):
        return jax.jit(make_gradients(policy.bound, objective))(policy.variables, {}, batch, jnp.int32(0))

    (loss, gradients, _), (expected_loss, expected, _) = run(soft, rows), run(wide, spelled)
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    embedding = expected["params"]["embed"]["embedding"]
    pairs = [
        (gradients["prompt"]["inputs"]["vectors"], embedding[size:]),
        (gradients["params"]["embed"]["embedding"], embedding[:size]),
        (gradients["params"]["layers"], expected["params"]["layers"]),
    ]
    for got, wanted in pairs:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)
    assert np.abs(pairs[0][0]).max() > 1e-4


@pytest.mark.parametrize("number", [1, None])
def test_decoding_with_a_prompt(number):
    soft, wide = with_prompts()
    left_out = ("prompt",) if number is None else ()
    soft, prompts = soft.asked(soft_prompt=number or 0, without=left_out), ["a", "The quick brown fox"]
    size = soft.bound.model.config.vocab_size
    before = [] if number is None else extra_tokens(soft, number)
    made = generate(soft, prompts, Sampling(max_new_tokens=3), batch_size=4)

    @jax.jit
    def logits(batch):
        return wide.bound.unembed(wide.variables, wide.bound.hidden(wide.variables, batch)[0][0])[:, :size]

    for prompt, generation in zip(prompts, made):
        tokens = [*before, *soft.encode(prompt)]
        for token in generation.token_ids:
            batch = batching.padded([tokens], 32, left=False)
            assert token == np.asarray(logits(batch))[len(tokens) - 1].argmax()
            tokens.append(token)
    pairs = [{"prompt": p, "completion": soft.decode(g.token_ids)} for p, g in zip(prompts, made)]
    pairs = [pair for pair in pairs if pair["completion"]]
    scored = score(soft, pairs, batch_size=4)
    again = score(soft, pairs, batch_size=1)
    assert pairs and all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(scored, again))


def test_a_prompt_of_peft():
    """Logits, loss, gradient and greedy text are those of PEFT and of `inputs_embeds` in transformers."""
    expected = np.load(PEFT / "expected.npz")
    bound, params = tiny_training.bound_model("llama_gqa_tied")
    adapter = weights.read_adapter(PEFT, bound.model.config)
    tuner = prompt_tuning(**adapter.options)
    policy = Policy(
        bind(bound.model, [tuner]),
        {"params": params, "prompt": jax.tree.map(jnp.asarray, adapter.variables)},
        types.SimpleNamespace(eos_ids=(), decode=lambda tokens, skip_special: ""),
    )
    length, rows = tuner.prompt_length, expected["tokens"]
    batch = batching.padded([[0] * length + row.tolist() for row in rows], length + rows.shape[1], False, range(length))

    def run(vectors):
        variables = {**policy.variables, "prompt": {"inputs": {"vectors": vectors}}}
        hidden, _ = policy.bound.hidden(variables, batch)
        logits = policy.bound.unembed(variables, hidden[:, length:])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), rows[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(expected["weights"] * chosen) / expected["weights"].sum(), logits

    vectors = policy.variables["prompt"]["inputs"]["vectors"]
    (loss, logits), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(vectors)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5)
    assert np.linalg.norm(logits - expected["logits"]) <= 3e-6 * np.linalg.norm(expected["logits"])
    assert float(loss) == pytest.approx(float(expected["loss"]), abs=1e-5)
    np.testing.assert_allclose(gradient, expected["gradient"], atol=1e-5)
    (made,) = generate(policy, [rows[0].tolist()], Sampling(max_new_tokens=len(expected["greedy"])))
    assert list(made.token_ids) == expected["greedy"].tolist()


@pytest.mark.parity
def test_peft_loads_our_prompt(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    bound, _ = tiny_training.bound_model("llama_gqa_tied")
    adapter = weights.read_adapter(PEFT, bound.model.config)
    base = str(hf_layout.GOLDENS / "families" / "llama_gqa_tied")
    weights.write_adapter(tmp_path / "ours", adapter, base=base, config=bound.model.config)
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    vectors = model.prompt_encoder.default.embedding.weight.detach().numpy()
    np.testing.assert_array_equal(vectors, adapter.variables["inputs"]["vectors"])


@pytest.mark.parametrize("init", ["uniform", "uniform_positive", "vocabulary"])
def test_starts(init):
    tuner = prompt_tuning(length=50, init=init, scale=0.5, tokens=(7, 9))
    policy = tiny()
    bound = bind(policy.bound.model, [tuner])
    variables = init_variables(bound, tiny_training.SHARDER, 0, {"params": policy.variables["params"]})
    vectors, embedding = np.asarray(variables["prompt"]["inputs"]["vectors"]), policy.variables["params"]["embed"]
    np.testing.assert_array_equal(vectors[:2], embedding["embedding"][np.array([7, 9])])
    rest = vectors[2:]
    if init == "vocabulary":
        assert all((row == np.asarray(embedding["embedding"])).all(-1).any() for row in rest)
    else:
        low = -0.5 if init == "uniform" else 0.0
        assert rest.min() == pytest.approx(low, abs=0.02) and rest.max() == pytest.approx(0.5, abs=0.02)


def asked_to_start(**options):
    """(the vectors that a recipe's prompt begins with, `[length, embed]`; the model's embedding, the tokenizer)."""
    policy = tiny()
    tuners = (configs.spec("prompt_tuning", **options),)
    stage = configs.stage(data=configs.data("x.jsonl"), steps=1, tuners=tuners)
    recipe = configs.recipe(model=configs.model("x"), stages=(stage,))
    (stage,) = resolve_stages(recipe, policy.bound.model, policy.tokenizer)
    params, length = policy.variables["params"], stage.bound.prompt_tuner.prompt_length
    variables = {"params": params, "prompt": {"inputs": {"vectors": jnp.zeros((length, 32))}}}
    vectors = stage.bound.start(variables, ["prompt"])["prompt"]["inputs"]["vectors"]
    return np.asarray(vectors), np.asarray(params["embed"]["embedding"]), policy.tokenizer


@pytest.mark.parametrize(
    "options, groups",
    [
        ({"text": "Sum: "}, ["S", "u", "m", ":", " "]),
        ({"labels": (" True", " False", " no")}, [" True", " False", " no"]),
    ],
    ids=["text", "labels"],
)
def test_starts_from_words(options, groups):
    """A row of the embedding for each token of a text, the mean of its rows for each label, then other rows."""
    vectors, embedding, tokenizer = asked_to_start(length=200, **options)
    for vector, word in zip(vectors, groups):
        rows = [embedding[token] for token in tokenizer.encode(word)]
        assert len(rows) == len(word)
        np.testing.assert_allclose(vector, sum(rows) / len(rows), rtol=1e-5, atol=1e-6)
    rest = vectors[len(groups) :]
    drawn = [int(np.flatnonzero((row == embedding).all(-1))[0]) for row in rest]
    assert len(set(drawn)) == len(rest) == 200 - len(groups), "drawn without replacement"


@pytest.mark.parametrize(
    "options, told",
    [
        ({"text": "Sum", "labels": ("a",)}, "Give one of them"),
        ({"text": "Sum: ", "length": 4}, "begins with 5 vectors, and length is 4.*Set length=5"),
        ({"labels": ("a", "b", "c"), "length": 2}, "begins with 3 vectors, and length is 2"),
        ({"tokens": (1, 2, 3), "length": 2}, "begins with 3 vectors, and length is 2"),
        ({"labels": ("a", "")}, "label 1 has no tokens"),
        ({"length": 0}, "length=0 and prompts=1"),
    ],
)
def test_words_that_cannot_start_a_prompt(options, told):
    with pytest.raises(LuthierError, match=told):
        asked_to_start(**options)


def test_two_prompts_at_once_are_refused():
    with pytest.raises(LuthierError, match="prompt_tuning and prompt_tuning both fill the placeholders"):
        bind(tiny().bound.model, [prompt_tuning(), prompt_tuning(collection="other")])


def test_words_need_a_tokenizer():
    with pytest.raises(LuthierError, match="need a tokenizer"):
        prompt_tuning(text="Sum").start({})


STAGES = """
    c.stage(name="prompt", data=DATA, steps=3, batch_size=4, sequence_length=64, tuners=(SOFT,),
            optimizer=c.spec("adafactor"), schedule=c.spec("constant", peak=0.3)),
    c.stage(name="model", data=DATA, steps=3, batch_size=4, sequence_length=64, tuners=(SOFT,), train=("params",),
            schedule=c.spec("constant", peak=1e-3)),
""".replace("SOFT", 'c.spec("prompt_tuning", length=4, text="Sum:")')


def test_the_stages_of_promot_leave_what_they_do_not_train(tmp_path, monkeypatch):
    """Stage 1 leaves the model, stage 2 the prompt, bit by bit."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    file = tiny_run.write_run(tmp_path, STAGES.strip().rstrip(","))
    recipe = configs.load(str(file))
    both = luthier.train(recipe, tmp_path / "both").policy.variables
    tuned = configs.from_json(configs.to_json(recipe))
    with tuned.unlocked():
        tuned.stages = recipe.stages[:1]
    first = luthier.train(tuned, tmp_path / "first").policy.variables
    start = weights.load(str(tmp_path / "model")).params
    jax.tree.map(np.testing.assert_array_equal, first["params"], start)
    np.testing.assert_array_equal(both["prompt"]["inputs"]["vectors"], first["prompt"]["inputs"]["vectors"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), both["params"], start)
    assert min(jax.tree.leaves(moved["layers"]["mlp"])) > 0
    # What was saved: a prompt for PEFT, or the model with its prompt beside it, which is attached when it is asked.
    for workdir, expected in ((tmp_path / "first", first), (tmp_path / "both", both)):
        saved = from_source(str(workdir))
        assert saved.prompt_slots == (0, 1, 2, 3) and saved.asked(without=list(saved.variables)).prompt_slots == ()
        (collection,) = saved.variables.keys() - {"params"}
        jax.tree.map(np.testing.assert_array_equal, saved.variables["params"], expected["params"])
        jax.tree.map(np.testing.assert_array_equal, saved.variables[collection], expected["prompt"])
    settings = json.loads((tmp_path / "both/final/tuners/prompt/adapter_config.json").read_text())
    assert settings["peft_type"] == "PROMPT_TUNING" and settings["num_virtual_tokens"] == 4
    alone = from_source(str(tmp_path / "both/final/tuners/prompt"))
    assert len(alone.bound.tuners) == 1


@pytest.mark.parity
def test_transformers_reads_the_result_of_promot(tmp_path, monkeypatch):
    """Logits of the trained model, alone and behind the trained prompt as `inputs_embeds`, and greedy text."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    file = tiny_run.write_run(tmp_path, STAGES.strip().rstrip(","))
    start = tiny()  # whose text hangs on the whole context
    weights.export(tmp_path / "model", start.bound.model.config, start.variables["params"], start.tokenizer)
    luthier.train(configs.load(str(file)), tmp_path / "run")
    final = tmp_path / "run/final"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        final, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    (vectors,) = hf_layout.read_safetensors(final / "tuners/prompt/adapter_model.safetensors").values()
    ours = from_source(str(tmp_path / "run"))
    rows = np.random.default_rng(0).integers(0, 256, (3, 9))
    embeds = theirs.get_input_embeddings()(torch.tensor(rows)).detach()
    embeds = torch.cat([torch.tensor(vectors)[None].expand(len(rows), -1, -1), embeds], dim=1)
    with torch.no_grad():
        alone, behind = theirs(torch.tensor(rows)).logits, theirs(inputs_embeds=embeds).logits[:, len(vectors) :]
        greedy = theirs.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    def logits(policy, length):
        tokens = [[0] * length + row.tolist() for row in rows]
        batch = batching.padded(tokens, length + rows.shape[1], False, range(length) if length else ())
        return policy.bound.unembed(policy.variables, policy.bound.hidden(policy.variables, batch)[0][:, length:])

    without = ours.asked(without=[name for name in ours.variables if name != "params"])
    for got, want in ((logits(without, 0), alone.numpy()), (logits(ours, len(vectors)), behind.numpy())):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    untrained = logits(start, 0)
    assert np.abs(alone.numpy() - untrained).max() > 0.1, "the model is trained"
    assert (alone - behind).abs().max() > 0.1 and len(np.unique(greedy)) > 6, "the prompt matters"
    endless = types.SimpleNamespace(eos_ids=(), decode=lambda tokens, skip_special: "")
    made = generate(dataclasses.replace(ours, tokenizer=endless), rows.tolist(), Sampling(max_new_tokens=8))
    assert [list(one.token_ids) for one in made] == greedy.tolist()


def test_a_stage_ends_with_its_best_checkpoint(tmp_path, monkeypatch):
    """At a rate that spoils the model, with the first; again when the finished run is started again."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    stage = """c.stage(data=DATA, steps=4, batch_size=4, sequence_length=64, hand_on="-loss",
                       schedule=c.spec("constant", peak=1.0, warmup=0.0))"""
    recipe = configs.load(str(tiny_run.write_run(tmp_path, stage, every=1)))
    results = [luthier.train(recipe, tmp_path / "run").policy.variables["params"] for _ in range(2)]
    losses = tiny_run.losses(tmp_path / "run")
    assert losses.argmin() == 0 and losses[-1] > 2 * losses[0]
    checkpoints = tmp_path / "run/checkpoints/sft"
    for later in (3, 4):
        shutil.rmtree(checkpoints / str(later))
    saved = tiny_run.checkpointed(tmp_path / "run")
    best = {name.split("/", 4)[-1]: x for name, x in saved.items() if "/trainable/" in name}
    for params in results:
        found = flatten_dict(params, sep="/")
        assert found.keys() == best.keys() and all((np.asarray(found[name]) == best[name]).all() for name in best)


@pytest.mark.parametrize(
    "override, told",
    [
        ("stages[0].data.prompt=1", "data\\[0\\].prompt is 1"),
        ("stages[0].sequence_length=4", "no room in 4 tokens"),
        ("stages[1].tuners=()", "hands on prompt"),
        ("stages[0].hand_on=eval/sums", "'eval/sums' is never measured during training"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, override, told):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    file = tiny_run.write_run(tmp_path, STAGES.strip().rstrip(","), examples=8)
    with pytest.raises(LuthierError, match=told):
        luthier.train(configs.load(str(file), [override]), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "told before anything is trained"
