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
# # Learn a task without taking on its format: ProMoT
#
# Fine-tune a language model on one task, ask it another, and it may answer in the form of the first: a number, or
# "true", whatever the question was. This is **format specialisation**. The form of the answers is the easiest thing
# about a task, so it is learnt first, and where the model's own weights learn it, every other task gets it too. What
# looks like forgotten knowledge is in part this, say the authors of
# [arXiv 2211.00635](https://arxiv.org/abs/2211.00635) (ICLR 2024).
#
# **ProMoT**, prompt tuning with model tuning, gives the form a place of its own:
#
# 1. **The prompt.** A soft prompt, a few learned vectors in front of the input, is trained with the model frozen. It
#    takes up what is easy.
# 2. **The model.** The model is trained with that prompt frozen and attached. The form is in place already, and what
#    is left to learn is the task.
#
# Afterwards the prompt stays with its task. Elsewhere it is left out, and the form with it.
#
# Below both stages run on the [laboratory model](../benchmarks/studies/laboratory/README.md), with full fine-tuning
# beside them. It is a decoder of 2.8 million parameters that learns in context. Its weights lie in the repository,
# and on two CPU cores the whole takes about five minutes. This is one run with one seed. What five seeds say, and
# which parts of the paper's story they bear out, stands in
# [docs/results/promot.md](../docs/results/promot.md), and here at the end. New to Luthier? The
# [quickstart](quickstart.ipynb) explains what this notebook takes for granted.

# %%
import os
import pathlib

CLONE = pathlib.Path(os.environ.get("LUTHIER_CLONE", ".."))  # of the repository: this notebook lies in its colabs/
REPOSITORY = ""  # without a clone: what git shall clone, such as "https://…"
STEPS = int(os.environ.get("LUTHIER_STEPS", 200))  # updates of the model; the prompt gets half as many
QUESTIONS = int(os.environ.get("LUTHIER_QUESTIONS", 200))  # of each task; there are 300
WORKDIR = pathlib.Path("runs/promot")

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
# The model's language has some six hundred words, and its tasks are about lists of letters, numbers and words. The
# target, which is trained, asks whether a list of letters is in order, without demonstrations and always in one
# format. Its answers are two words, `true` and `false`. No episode of the model's pretraining had this task.
#
# Twelve other tasks are only asked: seven after four solved examples each, in as many formats, and five (`told-…`)
# that are named, as an instruction would name them. `true` or `false` is right in none of them.

# %%
import json

import rich
from laboratory import MODEL, suite
from rich.table import Table

MODEL = str(MODEL)
TARGET, OTHERS = "ordered", tuple(suite.RETAINED)
WORDS = suite.TARGETS[TARGET].labels
RECORDS = WORKDIR / "records"
suite.write(RECORDS)

table = Table("task", "shots", "a question", "its answer", title=f"{TARGET} is trained, the others are asked only")
for label in (TARGET, *OTHERS):
    record = json.loads((RECORDS / label / "test.jsonl").read_text().splitlines()[0])
    table.add_row(label, str(suite.ALL[label].shots), repr(record["prompt"]), repr(record["completion"]))
rich.print(table)

# %% [markdown]
# How they are asked. `apart` names what stays with the target: at the other tasks the soft prompt is left out, which
# changes nothing for a model that has none. An answer counts if it is right to the letter, format included.

# %%
target = suite.evaluations(RECORDS, (TARGET,), limit=QUESTIONS)
others = suite.evaluations(RECORDS, OTHERS, limit=QUESTIONS, apart=("prompt",))

# %% [markdown]
# ## The stages
#
# Adafactor, the prompt's rate of 0.3, label smoothing and dropout are those of the paper and of the prompt-tuning
# code that it builds on. The model's rate, 3e-3, is the middle one of three that the study tried; the highest learns
# the target a little better and forgets much more, as the end of this notebook shows. The prompt is shorter, and the
# steps are far fewer.

# %%
from luthier import config as c

soft_prompt = c.spec("prompt_tuning", length=10)


def stage(name, steps, rate, **chosen):
    """What the stages have in common."""
    return c.stage(
        name=name,
        data=c.data(f"{RECORDS}/{TARGET}/train.jsonl"),
        steps=steps,
        batch_size=2,  # rows, each of some twenty examples
        sequence_length=256,
        schedule=c.spec("constant", peak=rate),
        clip_norm=0.0,
        **chosen,
    )


first = stage(
    "prompt",
    STEPS // 2,
    0.3,
    tuners=(soft_prompt,),  # what is trained, if nothing else is said
    objective=c.spec("sft"),
    optimizer=c.spec("adafactor", multiply_by_parameter_scale=False),
)
second = {
    "name": "model",
    "steps": STEPS,
    "rate": 3e-3,
    "train": ("params",),  # the model's own weights alone
    "objective": c.spec("sft", label_smoothing=0.1),
    "optimizer": c.spec("adafactor", multiply_by_parameter_scale=True),
}


def recipe(name, *stages, **asked):
    return c.recipe(
        name=name,
        model=c.model(MODEL, compute_dtype=compute_dtype, remat="none", dropout=0.1),
        stages=stages,
        checkpoint=c.checkpoint(every=50),
        logging=c.logging(tensorboard=False),
        **asked,
    )


# %% [markdown]
# ## Stage 1: the prompt
#
# The recipe that ends here is plain prompt tuning. Its `evaluations` are asked before and after, its `baselines` only
# before: they are what the model can do without any of this.

# %%
from luthier import train

run = train(recipe("prompt", first, evaluations=target, baselines=others), WORKDIR / "prompt")

# %% [markdown]
# What has the prompt taken up? Of the answers to the target's questions, the share that is one of its two words, and
# the share that is right. Who knows the form and nothing else is right about half of the time.
#
# (In the model's own weights, too, the form comes first: in the beginning the gradients of full fine-tuning on this
# task are those of its form alone, as [docs/results/promot_format.md](../docs/results/promot_format.md) shows.)

# %%
import numpy as np

from luthier.reporting.tables import percent


def says_word(result):
    """Of each answer, whether it is one of the target's words."""
    return [float(record["completion"].strip() in WORDS) for record in result.records]


before = {label: run.evaluations[f"before-{label}"] for label in (TARGET, *OTHERS)}
prompt_alone = run.evaluations[f"after-{TARGET}"]
for when, result in {"before": before[TARGET], "with the prompt": prompt_alone}.items():
    in_form = percent(np.mean(says_word(result)))
    print(f"{when}: {in_form} are {' or '.join(WORDS)}, {percent(result.value)} are right")

# %% [markdown]
# Frozen means untouched to the last bit, and that can be checked.

# %%
from luthier import weights


def is_identical(one, other):
    """Whether two trees of arrays hold the same bits."""
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, other)
    return all(jax.tree.leaves(same))


start, vectors = weights.load(MODEL).params, run.policy.variables["prompt"]
print("stage 1 left the model bit-identical:", is_identical(run.policy.variables["params"], start))
print("numbers trained:", sum(x.size for x in jax.tree.leaves(vectors)))

# %% [markdown]
# ## Stage 2: the model
#
# ProMoT's recipe has both stages. The first one ran above, to look at it alone; given its checkpoint, `train` does
# not repeat it. Without the line that copies it, it would.

# %%
shutil.copytree(WORKDIR / "prompt" / "checkpoints", WORKDIR / "promot" / "checkpoints", dirs_exist_ok=True)
promot = train(recipe("promot", first, stage(**second, tuners=(soft_prompt,))), WORKDIR / "promot")

# %%
trained = promot.policy.variables
print("stage 2 left the prompt bit-identical:", is_identical(trained["prompt"], vectors))
print("stage 2 left the model bit-identical:", is_identical(trained["params"], start))

# %% [markdown]
# ## Full fine-tuning, with the same budget
#
# The second stage without a prompt: as many updates of the model, by as many rows of the same data. (ProMoT's first
# stage comes on top. To give full fine-tuning those steps too, raise `steps`.)

# %%
from luthier.evals import evaluate

full = train(recipe("full", stage(**second)), WORKDIR / "full")
after = {
    "ProMoT": evaluate(promot.policy, (*target, *others)),
    "full fine-tuning": evaluate(full.policy, (*target, *others)),
}

# %% [markdown]
# ## The target
#
# Here the two should be about as good, or the comparison below is one of different amounts of learning. ProMoT is
# asked without its prompt too: does the model do the task by itself, or only behind the prompt?

# %%
import dataclasses

from luthier.reporting import result_table

without = promot.policy.asked(without=("prompt",))
results = {
    "before": before[TARGET],
    "the prompt alone": prompt_alone,
    "ProMoT": after["ProMoT"][TARGET],
    "ProMoT without its prompt": evaluate(without, target)[TARGET],
    "full fine-tuning": after["full fine-tuning"][TARGET],
}
rich.print(result_table(dataclasses.asdict(result) | {"name": name} for name, result in results.items()))

# %% [markdown]
# ## What was kept
#
# The retention tables of both: the other tasks before and after, on the same questions, with intervals of the
# differences. ProMoT is asked without its prompt. A task says something about forgetting only if there is something
# to forget: one that starts less than 20 points above chance is left out, with the reason.

# %%
from luthier.evals.retention import of_evaluations
from luthier.reporting import retention_table

kept = {}
for method, found in after.items():
    sides = {label: (dataclasses.asdict(before[label]), dataclasses.asdict(found[label])) for label in OTHERS}
    kept[method] = of_evaluations(sides)
    table = retention_table(kept[method])
    table.title = f"What {method} kept"
    rich.print(table)

# %% [markdown]
# Format specialisation in one number: how often is the answer to a question of another task `true` or `false`?

# %%
table = Table("task", "before", *after, title=f"Answers that are {' or '.join(WORDS)}")
for label in OTHERS:
    table.add_row(label, *(percent(np.mean(says_word(found[label]))) for found in (before, *after.values())))
table.add_section()
shares = (np.mean([says_word(found[label]) for label in OTHERS]) for found in (before, *after.values()))
table.add_row("all", *map(percent, shares))
rich.print(table)

# %% [markdown]
# And how much of what was lost is this? Of the answers that were right before and are wrong now, the share that is
# one of these words.

# %%
for method, found in after.items():
    pairs = [(old, new) for label in OTHERS for old, new in zip(before[label].records, found[label].records)]
    lost = [new["completion"].strip() in WORDS for old, new in pairs if old["score"] > new["score"]]
    print(f"{method}: {len(lost)} right answers lost, {sum(lost)} of them to {' or '.join(WORDS)}")

# %% [markdown]
# The two against each other: right answers to the same questions, of the tasks in the retention tables, and the
# target's words in all of the others.

# %%
from luthier.evals.statistics import paired_difference
from luthier.reporting.tables import points


def scores(result):
    return [record["score"] for record in result.records]


def difference(of, labels):
    """ProMoT − full fine-tuning, question by question, in points with an interval."""
    ours, theirs = ([x for label in labels for x in of(found[label])] for found in after.values())
    return points(paired_difference(ours, theirs))


entered = [row.label for row in kept["ProMoT"].rows]
for label in entered:
    print(f"{label}: {difference(scores, [label])}")
if entered:
    print(f"right answers, ProMoT − full fine-tuning: {difference(scores, entered)}")
print(f"the target's words elsewhere, ProMoT − full fine-tuning: {difference(says_word, OTHERS)}")

# %% [markdown]
# **What to look for.** ProMoT does here what it is said to do if three things hold together: the target is learnt
# about as well as by full fine-tuning, the other tasks fall less, and fewer of their answers are the target's words.
# The words are the plainest sign of a format that has spread. Where few answers are these words and many points are
# lost, most was lost in another way.
#
# The intervals are over questions: an interval that holds 0 says that this run cannot tell. They say nothing of other
# seeds, whose models differ by more.
#
# What the answers look like: of each task, the first question that the two answer differently.

# %%
table = Table("task", "question", "expected", "before", *after)
for label in OTHERS:
    for old, *new in zip(*(found[label].records for found in (before, *after.values()))):
        if new[0]["completion"] != new[1]["completion"]:
            shown = old["prompt"], old["expected"], *(one["completion"] for one in (old, *new))
            table.add_row(label, *map(repr, shown))
            break
rich.print(table)

# %% [markdown]
# ## Ask with the prompt and without it
#
# `asked` gives the same weights another way of being asked: with the prompt for the target, without it for everything
# else. Here both ways for both, a question of the target and two of other tasks.

# %%
from luthier.decoding import Sampling, generate

ASKED = [before[label].records[0]["prompt"] for label in (TARGET, "told-plus", "told-translate")]
SHORT = Sampling(max_new_tokens=12, stop=("\n\n",))
for way, policy in {"with the prompt": promot.policy, "without it": without}.items():
    for question, answer in zip(ASKED, generate(policy, ASKED, SHORT)):
        print(f"{way}: {question!r} {answer.text!r}")

# %% [markdown]
# What is left out with the prompt, in numbers: the tasks that are named, asked behind the target's prompt too.
# Without `apart` an evaluation leaves nothing out.

# %%
behind = evaluate(promot.policy, suite.evaluations(RECORDS, suite.NAMED, limit=QUESTIONS))
table = Table("task", "with the prompt", "without it", title=f"ProMoT's answers that are {' or '.join(WORDS)}")
for label, result in behind.items():
    table.add_row(label, *(percent(np.mean(says_word(side))) for side in (result, after["ProMoT"][label])))
rich.print(table)

# %% [markdown]
# ## Save it with the prompt and without it
#
# The run holds both. `final/` is an ordinary Hugging Face directory, which `transformers` loads as the model without
# the prompt. Beside it, in `final/tuners/prompt`, lies the prompt as PEFT writes one, which PEFT's
# `PeftModel.from_pretrained` puts back on. Luthier attaches it by itself: `luthier generate
# --model=runs/promot/promot`, and `--without=prompt` leaves it out. To hand on the model alone, export its weights
# alone.

# %%
from luthier.decoding import from_source

about, alone = weights.describe(MODEL), WORKDIR / "without-prompt"
config = promot.policy.bound.model.config
weights.export(alone, config, trained["params"], about.tokenizer, generation_config=about.generation_config)
for way, folder in {"with the prompt": WORKDIR / "promot" / "final", "without it": alone}.items():
    again = from_source(str(folder), compute_dtype=compute_dtype)
    same = all(is_identical(again.variables[name], trained[name]) for name in again.variables)
    print(f"{way}: {sorted(str(file.relative_to(folder)) for file in folder.glob('**/*.safetensors'))}")
    print(f"  read again: {sorted(again.variables)}, bit-identical: {same}, {len(again.prompt_slots)} vectors attached")

# %% [markdown]
# ## Is it the two stages?
#
# Each part of ProMoT can be taken away. The paper's ablations train prompt and model at once (`joint`), the model
# behind a prompt that was never trained (`random`), or a LoRA in the prompt's place (`lora-first`). They are in the
# two studies behind this notebook: five seeds each, the same tasks, and the model's rate once as above and once three
# times that. Their committed results, as means with Student's 95% intervals over the seeds:

# %%
from harness import interval, values_of

TRAINED = {
    "full": "the model",
    "promot": "the prompt, then the model",
    "joint": "prompt and model at once",
    "random": "the model, behind random vectors",
    "lora-first": "a LoRA, then the model with it",
}
MEASURES = {"after-ordered": "{:.1f} [{:.1f}, {:.1f}]", "retention": "{:+.1f} [{:+.1f}, {:+.1f}]"}
for study, renamed in {"promot_slower": {}, "promot": {"random": "random-fast"}}.items():
    results = json.loads((CLONE / "docs" / "results" / f"{study}.json").read_text())
    rate = results["rates"]["full"]
    table = Table("method", "what is trained", "the target, %", "the others, points", title=f"a rate of {rate:g}")
    for method, what in TRAINED.items():
        cells = []
        for measure, form in MEASURES.items():
            found = values_of(results["cells"], renamed.get(method, method), measure)
            cells.append(form.format(*interval([100 * share for share in found.values()])))
        table.add_row(method, what, *cells)
    rich.print(table)

# %% [markdown]
# At this notebook's rate ProMoT keeps about half of what full fine-tuning loses, at nearly the same accuracy on the
# target; but so do `joint` and `random`, so it is enough that something is attached while the model learns and stays
# with the task afterwards. At three times the rate everything forgets far more, and there the paper's story shows:
# `joint` and `random` hardly help, ProMoT does, as the form was in place before the model moved. `lora-first` keeps
# most at either, against the paper. [promot](../docs/results/promot.md) and
# [promot_slower](../docs/results/promot_slower.md) have more methods, the other tasks one by one, and what was
# expected beforehand.
#
# ## From here
#
# [configs/promot.py](../configs/promot.py) has ProMoT and its ablations as commands, on SmolLM2-135M and a task of
# sums. There three seeds do not tell ProMoT from full fine-tuning:
# [docs/results/promot_smollm2.md](../docs/results/promot_smollm2.md).
#
# ```sh
# luthier train --config=configs/promot.py --workdir=runs/promot-two-stages
# luthier train --config=configs/promot.py:full --workdir=runs/promot-full
# luthier train --config=configs/promot.py:joint --workdir=runs/promot-joint
# luthier report runs/promot-two-stages
# ```
#
# - Your own target: give `c.data(...)` your file, and ask the tasks that you care about. In a recipe, evaluations
#   with `retention=True` put the retention table into the report.
# - Several targets: `prompt_tuning(prompts=2)` holds a prompt for each, and `data(..., prompt=1)` says whose examples
#   these are. What two tasks do to each other: [docs/results/promot_tasks.md](../docs/results/promot_tasks.md).
# - "+1-shot" of the paper: `data(..., shots=1)` puts a solved example before each prompt while training.
# - The study again, an hour or two on two cores:
#   `PYTHONPATH=benchmarks/studies python -m promot runs/studies --jobs=2`.
