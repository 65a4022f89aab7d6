# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning as one-token reinforcement learning
#
# Supervised fine-tuning (SFT) pulls every target token up, however unlikely the model finds it. Reinforcement
# learning rewards only what the model says of its own accord, and is reported to forget less; but it needs whole
# generated answers and something that scores them. **One-token rollout** (OTR,
# [arXiv 2509.26313](https://arxiv.org/abs/2509.26313)) takes ordinary SFT data and makes of every position a
# reinforcement-learning problem of one step. At target $x$ the model itself proposes $K$ next tokens, at temperature
# $κ$; the target earns 1, any other token $β$:
#
# $$L = -\frac{1}{K}\sum_{j=1}^{K} R(a_j)\,\log\pi(a_j),\qquad a_j\sim\pi'=\mathrm{softmax}(z/κ),\qquad
# R(a)=\begin{cases}1 & a=x\\ β & a\ne x\end{cases}$$
#
# No gradient flows through the draws or the rewards. The logits $z$ are those of the step's own forward pass, so a
# step costs about one of SFT. The paper reports that OTR learns more than SFT, carries further beyond what was
# taught, and leaves more of everything else.
#
# Below: what it does at two positions of a real example, how the noise falls with $K$, what is left without noise (at
# $κ=1$ it is a method with another name), and a training run beside two rivals, asked for each of the three claims.
#
# All of it runs on the [laboratory model](../benchmarks/studies/laboratory/README.md), a decoder of 2.8 million
# parameters and 621 words that learns in context; its weights lie in the repository. On two CPU cores the whole takes
# a few minutes. It is one run with one seed, and **on this model and task the claims do not hold**: what five seeds
# say stands in [docs/results/one_token_rollout.md](../docs/results/one_token_rollout.md). What can be seen here is
# how it goes wrong.
#
# No code of the authors is public. $K=256$, $κ=1.3$ and $β=-0.1$ come from secondary sources, and that $\log\pi$ is
# taken at temperature 1 is our reading. New to Luthier? The [quickstart](quickstart.ipynb) explains what this
# notebook takes for granted.

# %%
import os
import pathlib

CLONE = pathlib.Path(os.environ.get("LUTHIER_CLONE", ".."))  # of the repository: this notebook lies in its colabs/
REPOSITORY = ""  # without a clone: what git shall clone, such as "https://…"
STEPS = int(os.environ.get("LUTHIER_STEPS", 150))  # of each method
QUESTIONS = int(os.environ.get("LUTHIER_QUESTIONS", 300))  # of each task; there are 300
K, KAPPA, BETA = 256, 1.3, -0.1
WORKDIR = pathlib.Path("runs/one-token-rollout")

# %% [markdown]
# ## Install
#
# In a clone where Luthier is installed this cell finds everything in place. On a fresh Colab machine fill in
# `REPOSITORY` above first.

# %%
import importlib.util
import shutil
import site
import subprocess
import sys

if not (CLONE / "setup.cfg").exists():
    if not REPOSITORY:
        raise SystemExit("Fill in REPOSITORY, or open this notebook in a clone of the repository")
    CLONE = pathlib.Path("luthier-clone")
    if not CLONE.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(CLONE)], check=True)
if importlib.util.find_spec("luthier") is None:
    packages = ["jax[cuda12]>=0.10,<0.14"] if shutil.which("nvidia-smi") else []
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{CLONE}[report]", *packages]
    subprocess.run(install, check=True)
    for folder in site.getsitepackages():
        site.addsitedir(folder)  # this Python looked for editable packages when it started
importlib.invalidate_caches()
sys.path.insert(0, str(CLONE / "benchmarks" / "studies"))

# %%
import jax

from luthier.parallel.compilation_cache import keep_programs

keep_programs()  # what is compiled stays on disk: run again, this notebook starts faster
device = jax.devices()[0]
is_before_ampere = device.platform == "gpu" and device.compute_capability.startswith(("6.", "7."))
compute_dtype = "float32" if device.platform == "cpu" else "float16" if is_before_ampere else "bfloat16"
print(f"{device.device_kind}: {compute_dtype}")

# %% [markdown]
# ## The tasks
#
# The model's language is made up: words of ten categories, letters, numbers and marks. What is taught, `odd`, asks
# for the one of three words that does not belong. `odd-one` says so, as an instruction would: pretraining had it, and
# the model follows it badly.
#
# Two other tasks ask how far the lesson carries: the same words in another format, and one word out of five. Eleven
# ask what is kept: six after four solved examples each, in as many formats, none of which names its task, and five
# that a word names.

# %%
import json

import rich
from laboratory import MODEL, suite
from rich.table import Table

TARGET, BEYOND = "odd", ("odd-reworded", "odd-of-five")
RETAINED = [label for label in suite.RETAINED if label != "outlier"]  # the target in other words
RECORDS = WORKDIR / "records"
suite.write(RECORDS)

table = Table("task", "shots", "prompt", "answer")
for label in (TARGET, *BEYOND, *RETAINED):
    first = json.loads((RECORDS / label / "test.jsonl").open().readline())
    table.add_row(label, str(suite.ALL[label].shots), repr(first["prompt"]), repr(first["completion"]))
rich.print(table)

# %% [markdown]
# The model before any training. A task says something about forgetting only if there is something to forget: one that
# starts less than 20 points above chance will be left out of the retention tables below, with the reason.

# %%
import dataclasses

from luthier.decoding import from_source
from luthier.evals import evaluate
from luthier.reporting import result_table

asked = suite.evaluations(RECORDS, (TARGET, *BEYOND, *RETAINED), limit=QUESTIONS)
start = from_source(str(MODEL), compute_dtype=compute_dtype)
before = evaluate(start, asked)
rich.print(result_table(map(dataclasses.asdict, before.values())))

# %% [markdown]
# ## The rivals
#
# A method here is one word of a recipe, its objective. Dynamic fine-tuning (DFT, $-\mathrm{sg}[\pi(x)]\log\pi(x)$)
# weights each target by its own probability. Why it is the rival to watch, shows below.
#
# The gradients differ in size and shape, so each method has a learning rate of its own: the best of three on
# `odd`, chosen by [the study](../docs/results/one_token_rollout.md) with another seed and other records. All else is
# equal; all weights are trained.

# %%
from luthier import config as c

OBJECTIVES = {
    "SFT": c.spec("sft"),
    "DFT": c.spec("dft"),
    "OTR": c.spec("one_token_rollout", k=K, temperature=KAPPA, beta=BETA),
}
RATES = {"SFT": 1e-3, "DFT": 3e-3, "OTR": 3e-3}


def recipe(method):
    stage = c.stage(
        name=method,
        data=c.data(str(RECORDS / TARGET / "train.jsonl")),
        steps=STEPS,
        batch_size=2,
        sequence_length=256,
        objective=OBJECTIVES[method],
        schedule=c.spec("cosine", peak=RATES[method], warmup=0.05),
    )
    model = c.model(str(MODEL), compute_dtype=compute_dtype, remat="none")
    kept, logged = c.checkpoint(every=50), c.logging(tensorboard=False)
    return c.recipe(name=method, model=model, stages=(stage,), checkpoint=kept, logging=logged)


# %% [markdown]
# ## The logits of a real row
#
# The first row of the first training batch, as the train step gets it, through the model as it is before training.
# The objectives see no more than this: the logits before each target. Targets are the answers, and the `</s>` that
# ends each.

# %%
import jax.numpy as jnp
import numpy as np

from luthier.training.run import dry_run

row = dry_run(recipe("OTR")).rows(0, 0, 1)
is_target = row["loss_weights"] > 0


@jax.jit
def logits_of(variables, row):
    hidden, _ = start.bound.hidden(variables, row)
    return start.bound.unembed(variables, hidden)


logits = logits_of(start.variables, row)[is_target]
targets = jnp.asarray(row["targets"][is_target])
print(f"{row['segment_ids'].max()} examples, {len(targets)} targets, logits {list(logits.shape)}")

# %% [markdown]
# ## Two positions
#
# Of the words that the row asks for, we look at two: the one that the model is most in two minds about, and the one
# that it finds least likely. The $K$ proposals are drawn by the function that training draws with. A hit is a
# proposal that is the target.
#
# A token's share of the loss is its reward times its share of the proposals. What becomes of its logit is another
# matter, since $\log\pi$ of every token holds all logits: the pull on a logit is $-\partial L/\partial z_a =
# r_a-π(a)\sum_b r_b$, where $r_a$ is that share.

# %%
from luthier.objectives.one_token_rollout import sample


def keys(seed):
    """A random key for each token, as the train step has them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(targets)))


rows = np.arange(len(targets))
proposed, policy = (np.asarray(jax.nn.softmax(z)) for z in (logits / KAPPA, logits))
gold = policy[rows, targets]  # π(x)
draws = np.asarray(jax.jit(sample, static_argnames="k")(keys(0), logits / KAPPA, k=K))
counts = np.stack([np.bincount(drawn, minlength=policy.shape[1]) for drawn in draws])
shares = np.where(np.arange(policy.shape[1]) == np.asarray(targets)[:, None], 1.0, BETA) * counts / K
pulls = shares - policy * shares.sum(axis=1, keepdims=True)


def show(position):
    place, x = np.flatnonzero(is_target)[position], int(targets[position])
    is_before = (row["segment_ids"][0] == row["segment_ids"][0, place]) & (np.arange(is_target.size) <= place)
    print(f"after {start.tokenizer.decode(row['tokens'][0, is_before])!r} the target is {name(x)}")
    title = f"{K} proposals, {np.sum(counts[position] > 0)} different tokens"
    table = Table("token", "drawn", "reward · share", "pull on its logit", f"π' (κ = {KAPPA})", "π", title=title)
    for token in [x, *(int(token) for token in np.argsort(-policy[position]) if token != x)][:8]:
        numbers = [f"{side[position, token]:+.4f}" for side in (shares, pulls)]
        numbers += [f"{side[position, token]:.4f}" for side in (proposed, policy)]
        mark = " (target)" if token == x else ""
        table.add_row(name(token) + mark, str(counts[position, token]), *numbers)
    rich.print(table)
    hits = counts[position, x]
    print(f"hit rate {hits}/{K} = {hits / K:.4f}, the target's probability π(x) = {gold[position]:.4f}")


def name(token):
    return repr(start.tokenizer.decode([token]))


is_word = np.asarray(targets) != start.tokenizer.eos_id
doubted = int(np.argmax(np.where(is_word, gold * (1 - gold), -1)))
unlikely = int(np.argmin(np.where(is_word, gold, 1)))
show(doubted)

# %% [markdown]
# Here the target is drawn often enough to be pulled up, and what competes with it goes down. Now the other one.

# %%
show(unlikely)

# %% [markdown]
# The target is hardly ever drawn, so that next to nothing pulls it up. And what the model wrongly is surest of,
# though each of its draws is punished, goes **up**. The reason is the temperature: the proposals are flatter than the
# model, so that its favourite is proposed less often than it is likely, and is punished less than it gains when
# everything else is pushed away.
#
# Over all targets of the row, the hit rate estimates $π'(x)$. The third line counts the targets that are out of reach
# for now: what was never proposed earns nothing. The last one tells at how many the likeliest wrong token goes up, as
# in the second table; where the model is less sure, it goes down.

# %%
hits = counts[rows, targets]
print(f"hit rate {hits.mean() / K:.4f}, mean π'(x) {proposed[rows, targets].mean():.4f}")
print("quantiles of π(x): " + ", ".join(f"{q:.0%} {np.quantile(gold, q):.2g}" for q in (0.1, 0.25, 0.5, 0.75, 0.9)))
favourite = np.argmax(np.where(np.arange(policy.shape[1]) == np.asarray(targets)[:, None], 0, policy), axis=1)
print(f"never hit: {np.sum(hits == 0)} of {len(targets)} targets")
print(f"likeliest wrong token pulled up: {np.sum(pulls[rows, favourite] > 0)} of {len(targets)}")

# %% [markdown]
# ## More proposals, less noise
#
# The expectation over proposals needs no draws: $-\big[π'(x)\logπ(x)+β\sum_{a\ne x}π'(a)\logπ(a)\big]$ with $π'$ held
# fixed is `mode="exact"`. Its gradient in the logits is what the draws should come to. The error, relative to it,
# should fall as $1/\sqrt K$, so that its product with $\sqrt K$ stays as it is.

# %%
from luthier.objectives.one_token_rollout import one_token_rollout


def gradient(loss):
    """Of each token's loss in its own logits, as a function of the seed."""

    @jax.jit
    @jax.grad
    def of_sum(logits, seed):
        return loss.token_fn(logits, {"targets": targets}, keys(seed))["loss"].sum()

    return lambda seed=0: of_sum(logits, seed)


exact = gradient(one_token_rollout(mode="exact", temperature=KAPPA, beta=BETA))()
noise = []
for k in (1, 16, 256, 4096):
    drawn = gradient(one_token_rollout(k=k, temperature=KAPPA, beta=BETA))
    errors = [float(jnp.linalg.norm(drawn(seed) - exact) / jnp.linalg.norm(exact)) for seed in range(4)]
    noise.append({"K": k, "error": np.sqrt(np.mean(np.square(errors)))})
    print(f"K {k:5}  error {noise[-1]['error']:8.4f}  error · √K {noise[-1]['error'] * k**0.5:.3f}")

# %%
import altair as alt

lines = [{**point, "line": "drawn"} for point in noise]
lines += [{"K": point["K"], "error": noise[0]["error"] / point["K"] ** 0.5, "line": "1/√K"} for point in noise]
log = alt.Scale(type="log")
alt.Chart(alt.Data(values=lines), title="Error of the drawn gradient", width=320, height=220).mark_line(
    point=True
).encode(
    x=alt.X("K:Q", scale=log, title="proposals K"),
    y=alt.Y("error:Q", scale=log, title="relative error"),
    color=alt.Color("line:N", title=None),
    strokeDash="line:N",
)

# %% [markdown]
# ## At temperature 1 it is DFT
#
# Without noise the pull on the logits can be written in two parts, where $1_x$ is 1 at the target and 0 elsewhere:
#
# $$-\frac{\partial L}{\partial z} = (1-β)\,π'(x)\,\big[1_x-π\big] + β\,\big[π'-π\big]$$
#
# The first raises the target, the more the likelier it is proposed: at $κ=1$, where $π'=π$, it is $1-β$ times the
# pull of DFT, and all there is. An optimizer such as Adam, which divides by the gradient's size, hardly sees the
# factor. The second is what OTR has of its own beside the noise, and no target occurs in it: for $κ>1$ and $β<0$ it
# moves the model away from the flatter $π'$, so that whatever it is sure of, it becomes surer of; with $β>0$ it
# flattens.

# %%
from luthier.objectives.dft import dft

of_dft = gradient(dft())()
table = Table("κ", "β", "1 − β", "OTR / DFT", "what is left of OTR", title="exact gradients")
for kappa in (1.0, KAPPA):
    for beta in (BETA, 0.0, 0.3):
        rollout = gradient(one_token_rollout(mode="exact", temperature=kappa, beta=beta))()
        ratio = jnp.vdot(rollout, of_dft) / jnp.vdot(of_dft, of_dft)
        left = jnp.linalg.norm(rollout - (1 - beta) * of_dft) / jnp.linalg.norm(rollout)
        table.add_row(f"{kappa:g}", f"{beta:g}", f"{1 - beta:.4f}", f"{ratio:.4f}", f"{left:.1e}")
rich.print(table)

raises = proposed[rows, targets][:, None] * (jax.nn.one_hot(targets, policy.shape[1]) - policy)
parts = (1 - BETA) * raises + BETA * (proposed - policy)
print(f"the two parts are the exact gradient up to {jnp.linalg.norm(parts + exact) / jnp.linalg.norm(exact):.1e}")

# %% [markdown]
# The last column is the norm of OTR − (1 − β)·DFT beside that of OTR: rounding in the rows of κ = 1.

# %% [markdown]
# ## Train all three
#
# The same data in the same order, the same steps, each at its own rate.

# %%
from luthier import train

after, metrics = {}, {}
for method in OBJECTIVES:
    run = train(recipe(method), WORKDIR / method)
    after[method], metrics[method] = evaluate(run.policy, asked), run.metrics
    del run  # and the weights that it holds

# %% [markdown]
# ## What was logged
#
# `hit_rate` is the share of proposals that are the target; `gold_probability` is $π(x)$, and `below_q` the share of
# positions where it is less than $q$: those below 0.01 are the ones that OTR hardly reaches.
#
# **The rows of `loss` are not comparable.** SFT's is $-\logπ$; DFT's is weighted by $π$, so that it is small where
# the model is surest of being wrong; OTR's is a sum of rewards and can be negative. A lower one does not mean a
# better model. The other rows mean the same thing wherever they stand: beginning → end, on the batches trained on.

# %%
names = ["loss", "mean_token_accuracy", "entropy", "hit_rate"]
names += [f"gold_probability{suffix}" for suffix in ("", "/below_0.01", "/below_0.1", "/below_0.5", "/below_0.9")]
table = Table("metric", *metrics)
for metric in names:
    ends = [[record[metric] for record in (found[0], found[-1]) if metric in record] for found in metrics.values()]
    table.add_row(metric, *(" → ".join(f"{value:.4f}" for value in pair) or "–" for pair in ends))
rich.print(table)

# %% [markdown]
# Every other target is the end of an answer. So whoever ends his answers, and names the same place of the three words
# always, is right at two thirds of the targets. Which methods get beyond?

# %%
curves = [
    {"step": record["step"], "method": method, "accuracy": record["mean_token_accuracy"]}
    for method, found in metrics.items()
    for record in found
]
alt.Chart(alt.Data(values=curves), title="Accuracy in training", width=420, height=220).mark_line().encode(
    x="step:Q",
    y=alt.Y("accuracy:Q", title=None),
    color=alt.Color("method:N", title=None),
    strokeDash="method:N",
)

# %% [markdown]
# OTR alone, its steps on a logarithmic axis. What lies between the lines of `below_0.01` and `below_0.9` are targets
# that the model is undecided about. Where the two lines meet, none is left: every target is certain, or out of reach.

# %%
curves = [
    {"step": record["step"], "metric": metric, "value": record[metric]}
    for record in metrics["OTR"]
    for metric in ("hit_rate", "gold_probability/below_0.01", "gold_probability/below_0.9")
]
alt.Chart(alt.Data(values=curves), title="OTR", width=420, height=220).mark_line().encode(
    x=alt.X("step:Q", scale=alt.Scale(type="log", nice=False)),
    y=alt.Y("value:Q", title=None),
    color=alt.Color("metric:N", title=None),
)

# %% [markdown]
# ## What was learnt
#
# **The evaluations are comparable**: one set of held-out questions, the same way of asking. Beside each interval
# stands the difference from SFT on the same answers. It is one seed: where an interval holds 0, this run cannot tell
# the two apart, and the intervals know nothing of what another seed would do.

# %%
from luthier.evals.statistics import paired_difference
from luthier.reporting.tables import percent, points

sides = {"before": before, **after}


def compare(label):
    """A task before and after each method, and the differences from SFT."""
    named = [dataclasses.replace(found[label], name=f"{method}: {label}") for method, found in sides.items()]
    rich.print(result_table(map(dataclasses.asdict, named)))
    for method in ("DFT", "OTR"):
        print(f"{label}, {method} − SFT: {points(paired_difference(scores(method, label), scores('SFT', label)))}")


def scores(method, *labels):
    return [record["score"] for label in labels for record in sides[method][label].records]


compare(TARGET)

# %% [markdown]
# A third is also what naming the same place of the three always gives. Which of the three words is named, and in the
# last row, which one is right. (Which place a method prefers in the end may be another on another machine: rounding
# decided it where we looked.)

# %%
PLACES = ("first", "second", "third")


def places(answers, prompts):
    """How often an answer is the first, second or third word of its prompt, or none of them."""
    listed = [prompt.split(" : ")[1].split()[:3] for prompt in prompts]
    found = [words.index(answer.strip()) if answer.strip() in words else 3 for answer, words in zip(answers, listed)]
    return [percent(share) for share in np.bincount(found, minlength=4) / len(found)]


records = before[TARGET].records
prompts = [record["prompt"] for record in records]
table = Table("", *PLACES, "none of them", title="The word that is named")
for method, found in sides.items():
    table.add_row(method, *places([record["completion"] for record in found[TARGET].records], prompts))
table.add_section()
table.add_row("right", *places([record["expected"] for record in records], prompts))
rich.print(table)

# %%
table = Table("question", "expected", *sides)
for one in list(zip(*(found[TARGET].records for found in sides.values())))[:6]:
    table.add_row(repr(one[0]["prompt"]), one[0]["expected"], *(repr(record["completion"]) for record in one))
rich.print(table)

# %% [markdown]
# ## What carried over
#
# The paper's second claim is of tasks beyond the one that was taught: here another format, and one word out of five.

# %%
for label in BEYOND:
    compare(label)

# %% [markdown]
# ## What was kept
#
# The third claim, and the retention tables: the other tasks before and after, on the same questions, with intervals
# of the differences. Below them the methods against each other, over all questions of the tasks that entered.

# %%
from luthier.evals.retention import of_evaluations
from luthier.reporting import retention_table

for method, found in after.items():
    kept = of_evaluations(
        {label: (dataclasses.asdict(before[label]), dataclasses.asdict(found[label])) for label in RETAINED}
    )
    table = retention_table(kept)
    table.title = f"What {method} kept"
    rich.print(table)

entered = [one.label for one in kept.rows]  # the same for all: it is the start that decides
for method in ("DFT", "OTR"):
    print(f"kept, {method} − SFT: {points(paired_difference(scores(method, *entered), scores('SFT', *entered)))}")

# %% [markdown]
# **Five seeds** ([the page](../docs/results/one_token_rollout.md)): SFT ends at 73% of `odd`, DFT at 36% and OTR at
# 33%, and neither of the two gets beyond 37% at any of four rates. Beyond the task SFT is ahead of OTR too, by 36
# points in the other format and by 61 among five words; and OTR keeps less than SFT, by 7.5 points. So none of the
# claims came out here. The start is right a fifth of the time and often prefers a wrong word, and a loss that goes by
# what the model says already pulls least where the model is most wrong. The paper's models, billions of weights and
# mathematics they half know, mostly give the right token the larger share: what happens there cannot be seen here.
#
# ## From here
#
# - Change `BETA` to 0.1, the rate of OTR to 1e-3, and `WORKDIR`: the second part of the pull then flattens. In the
#   study that learns `odd` to 60%, and keeps no more than SFT.
# - ASFT, which is DFT held near the model it began as, keeps 13 points more than SFT there, and learns 12 less:
#   `c.spec("asft")` at 1e-3.
# - What the model gives no probability at all, the sum of three numbers, is asked in
#   [one_token_rollout_new](../docs/results/one_token_rollout_new.md): SFT learns it, DFT and OTR do not.
# - [configs/one_token_rollout.py](../configs/one_token_rollout.py) has the same on SmolLM2-135M, with a LoRA, as
#   commands; [what came of three seeds](../docs/results/one_token_rollout_smollm2.md). Beside `:sft`, `:dft` and
#   `:asft` there are `:exact` (the expectation, no noise) and `:masked_thought`.
#
# ```sh
# luthier train --config=configs/one_token_rollout.py --workdir=runs/rollout
# luthier train --config=configs/one_token_rollout.py:asft --workdir=runs/asft
# luthier train --config=configs/one_token_rollout.py --config.stages[0].objective.beta=0.0 --workdir=runs/no-push
# luthier report runs/rollout
# ```
#
# - The study itself, with all its methods, rates and seeds: [benchmarks/studies](../benchmarks/studies).
# - A token loss of your own is one function of a token's logits: [CONTRIBUTING.md](../CONTRIBUTING.md).
