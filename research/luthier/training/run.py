"""A run: a recipe from its config to a trained model, which can be killed at any moment."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from luthier import weights
from luthier.config import thaw
from luthier.data.batches import Batches, build
from luthier.data.chat import ChatTemplate
from luthier.decoding import Generation, Policy, Sampling, generate
from luthier.errors import LuthierError
from luthier.evals import EvalResult, evaluate, read_results
from luthier.models import ModelConfig, Transformer
from luthier.parallel import AXES, Sharder, make_mesh, make_sharder, processes
from luthier.parallel.compilation_cache import keep_programs
from luthier.training import manifest as manifests
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import Stage, run_stage
from luthier.training.metrics import (
    MetricsWriter,
    Throughput,
    forward_flops_per_token,
    read_metrics,
    train_flops_per_token,
)
from luthier.training.profile import Profile
from luthier.training.reference import check_reference, load_params, reference_variables
from luthier.training.reference_cache import with_cached_reference
from luthier.training.signals import Preemption
from luthier.training.stages import ResolvedStage, Update, make_stage_step, make_update, resolve_stages
from luthier.training.state import TrainState, abstract_state, init_state, init_variables, split
from luthier.training.step import check_batch, jit_step
from luthier.tuners import Bound, Tuner, bind, merge, plain

log = logging.getLogger(__name__)

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      workdir: what it wrote (docs/architecture.md).
      config: the resolved config.
      policy: the trained model.
      evaluations: results by "WHEN-LABEL", such as "before-chain_sum".
    """

    workdir: epath.Path
    config: ConfigDict
    policy: Policy = dataclasses.field(repr=False)
    evaluations: Mapping[str, EvalResult] = dataclasses.field(repr=False)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`."""
        return read_metrics(self.workdir)

    def generate(self, prompts: Sequence, **sampling: Any) -> list[Generation]:
        """Answers of the trained model; keywords are those of `Sampling`."""
        return generate(self.policy, prompts, Sampling(**sampling))


def train(config: ConfigDict, workdir: epath.PathLike | None = None, *, profile: str = "") -> Run:
    """Runs a recipe, or goes on with it where the workdir already holds a part.

    Args:
      config: from `luthier.config.load` or `recipe`.
      workdir: where everything is written; a temporary directory if None.
      profile: `START:STOP`, steps to trace into `WORKDIR/profile`.

    Raises:
      LuthierError: for anything wrong in the config, the data, the model or the workdir.
      Preempted: a signal came; everything is saved and the same call goes on.
    """
    processes.start()
    keep_programs()
    workdir = epath.Path(workdir if workdir is not None else tempfile.mkdtemp(prefix="luthier-"))
    traced = Profile.parse(workdir / "profile", profile)
    setup, params = prepare(config, workdir)
    variables: Variables = {"params": params}
    del params
    _evaluate(setup, bind(setup.stages[0].bound.model), variables, "before")
    with traced, Preemption() as preemption, contextlib.ExitStack() as open_files:
        writer, first = None, 0
        for index, (stage, batches) in enumerate(zip(setup.stages, setup.batches)):
            variables = init_variables(stage.bound, setup.sharder, config.seed + index, variables)
            trainable, frozen = split(variables, stage.train)
            update = make_update(stage.config, trainable)
            checkpoints = open_files.enter_context(_checkpoints(setup, stage.config))
            options = {"ema": stage.average is not None, "loss_scale": config.model.compute_dtype == "float16"}
            state, start = _restored(checkpoints, trainable, update.optimizer, setup.sharder, options)
            unfinished = start < stage.config.steps
            if unfinished and stage.config.cache_reference:
                identity = _reference_identity(setup, index)
                batches = with_cached_reference(batches, stage.reference, variables, identity)
            compared = stage.reference_in_step if unfinished else None
            beside = frozen | reference_variables(compared, variables, stage.train)
            variables = trainable = None  # The state is donated: only its newest version may be held.
            if unfinished:
                if writer is None:
                    writer = open_files.enter_context(_writer(setup, first + start))
                state = run_stage(
                    _stage(setup, stage, state, frozen, update, batches, first),
                    state,
                    beside,
                    start=start,
                    checkpoints=checkpoints,
                    writer=writer,
                    throughput=Throughput.of_devices(model_flops_per_token(stage)),
                    preemption=preemption,
                    profile=traced,
                    failures=workdir / "failures",
                )
            state = _best(checkpoints, stage.config, state) if stage.config.hand_on else state
            first += stage.config.steps
            variables = {**frozen, **stage.result(state)}
            del state, frozen, beside
    _save_result(setup, variables)
    _evaluate(setup, stage.bound, variables, "after")
    return Run(workdir, config, setup.policy(stage.bound, variables), read_results(workdir))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the stages of a run share: everything but the weights."""

    config: ConfigDict
    workdir: epath.Path
    about: weights.Description
    template: ChatTemplate | None
    sharder: Sharder
    stages: tuple[ResolvedStage, ...]
    batches: tuple[Batches, ...]

    def policy(self, bound: Bound, variables: Variables) -> Policy:
        return Policy(bound, variables, self.about.tokenizer, self.template)


def make_model(config: ConfigDict, shape: ModelConfig, sharder: Sharder) -> Transformer:
    """The model of a recipe."""
    chosen = config.model
    return Transformer(
        shape,
        dtype=jnp.dtype(chosen.compute_dtype),
        remat=chosen.remat,
        attention=chosen.attention,
        dropout=chosen.dropout,
        sharder=sharder,
    )


def prepare(config: ConfigDict, workdir: epath.Path) -> tuple[Setup, Variables]:
    """Checks everything that can be wrong, cheapest first, and loads the weights last."""
    about = weights.describe(config.model.source)
    template = _template(config, about)
    sharder = config_sharder(config, about.config)
    model = make_model(config, about.config, sharder)
    stages = resolve_stages(config, model, about.tokenizer)
    for stage in stages:
        check_batch(stage.config.batch_size, stage.config.micro_batches, sharder)
        if not _is_finished(workdir, stage.config):
            check_reference(stage.reference, about.tokenizer, f"stage {stage.config.name}")
    batches = tuple(_batches(stage, config.seed + index, about, template) for index, stage in enumerate(stages))
    setup = Setup(config, workdir, about, template, sharder, stages, batches)
    fingerprints = {f"data.{stage.name}": made.fingerprint for stage, made in zip(config.stages, batches)}
    fingerprints |= {"model": about.fingerprint, "tokenizer": about.tokenizer.fingerprint}
    counts = {stage.name: made.counts for stage, made in zip(config.stages, batches)}
    mesh = sharder.mesh.shape
    record = manifests.Manifest.gather(config, fingerprints=fingerprints, data=counts, mesh=mesh, note=about.note)
    manifests.start(workdir, record)
    return setup, load_params(config.model.source, bind(model), about)


def config_sharder(config: ConfigDict, shape: ModelConfig, devices=None) -> Sharder:
    """The mesh and sharding rules of a recipe over all devices, or the given ones."""
    mesh = make_mesh(**{axis: config.mesh[axis] for axis in AXES}, devices=devices)
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    return make_sharder(mesh, **heads, rules=config.mesh.rules)


def dry_run(config: ConfigDict, stage: int = 0) -> Batches:
    """The data of a stage, tokenised and planned, without weights or training."""
    about = weights.describe(config.model.source)
    chosen = resolve_stages(config, Transformer(about.config), about.tokenizer)[stage]
    return _batches(chosen, config.seed + stage, about, _template(config, about))


def _template(config: ConfigDict, about: weights.Description) -> ChatTemplate | None:
    file = config.model.template
    source = epath.Path(file).read_text() if file else about.tokenizer.chat_template
    return ChatTemplate(source, about.tokenizer.special_tokens, name=file or "chat template") if source else None


def _batches(stage: ResolvedStage, seed: int, about: weights.Description, template: ChatTemplate | None) -> Batches:
    config, soft = stage.config, stage.bound.prompt_tuner
    for number, section in enumerate(config.data if isinstance(config.data, tuple) else (config.data,)):
        if not 0 <= section.prompt < (soft.prompts if soft else 1):
            raise LuthierError(
                f"data[{number}].prompt is {section.prompt}, and there are {soft.prompts if soft else 0} soft prompts",
                where=f"stage {config.name}",
                mend='Attach spec("prompt_tuning", prompts=...) with as many',
            )
    batches = build(
        config.data,
        tokenizer=about.tokenizer,
        template=template,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=seed,
        packing=config.packing,
        prompt_length=soft.prompt_length if soft else 0,
        answers=stage.batching.answers,
        mismatched=stage.batching.mismatched,
    )
    if stage.batching.scores and not batches.has_scores:
        raise LuthierError(
            f"{config.objective.name!r} needs scores or labels and the data have none",
            where=f"stage {config.name}: data",
            mend="Give records scores (completions, scores) or labels (completion, label)",
        )
    return batches


def _checkpoint_directory(workdir: epath.Path, stage: ConfigDict) -> epath.Path:
    return workdir / "checkpoints" / stage.name


def _is_finished(workdir: epath.Path, stage: ConfigDict) -> bool:
    """Whether there is a checkpoint of the stage's last step."""
    return (_checkpoint_directory(workdir, stage) / str(stage.steps)).exists()


def _checkpoints(setup: Setup, stage: ConfigDict) -> Checkpoints:
    chosen = setup.config.checkpoint
    return Checkpoints(
        _checkpoint_directory(setup.workdir, stage),
        every=chosen.every,
        keep_last=chosen.keep_last,
        keep_best=stage.hand_on or chosen.keep_best,
    )


def _restored(checkpoints: Checkpoints, trainable, optimizer, sharder, options: dict) -> tuple[TrainState, int]:
    found = checkpoints.restore(abstract_state(trainable, optimizer, sharder, **options))
    if found is None:
        return init_state(trainable, optimizer, sharder, **options), 0
    log.info("going on after step %d of %s", found[1], checkpoints.directory.name)
    return found


def _best(checkpoints: Checkpoints, stage: ConfigDict, state: TrainState) -> TrainState:
    """The state of a finished stage's best checkpoint; the last one's memory is given up for it."""
    best = checkpoints.best()
    if best is None:
        raise LuthierError(
            f"no checkpoint has the metric {stage.hand_on!r}",
            where=f"stage {stage.name}: hand_on",
            mend="Take one of metrics.jsonl, written at every step that is saved, or leave it out",
        )
    log.info("stage %s ends with its step %d, the best by %s", stage.name, best, stage.hand_on)
    if best == stage.steps:
        return state
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)
    return checkpoints.restore(shapes, best)[0]


def _reference_identity(setup: Setup, index: int) -> list[str]:
    """What tells the reference model of a stage from any other: its weights, or how they came about, and its dtype."""
    stage, config = setup.stages[index], setup.config
    identity = [config.model.compute_dtype, setup.about.fingerprint]
    if stage.reference.about is not None:
        return [*identity, stage.reference.about.fingerprint]
    if index:  # as the stage begins: made by the stages before, of this run
        earlier = [json.dumps(thaw(one), sort_keys=True) for one in (config.model, *config.stages[:index])]
        data = [made.fingerprint for made in setup.batches[:index]]
        compared = [one.reference_fingerprint for one in setup.stages[:index]]
        return [*identity, str(config.seed), str(setup.workdir), *earlier, *data, *compared]
    return identity


def _writer(setup: Setup, resume_step: int) -> MetricsWriter:
    chosen = setup.config.logging
    return MetricsWriter(setup.workdir, tensorboard=chosen.tensorboard, wandb=chosen.wandb, resume_step=resume_step)


def _stage(
    setup: Setup, stage: ResolvedStage, state: TrainState, frozen, update: Update, batches: Batches, first: int
) -> Stage:
    config = stage.config

    def evaluate_now(state: TrainState, number: int) -> dict[str, float]:
        variables = {**frozen, **stage.result(state)}
        results = _evaluate(setup, stage.bound, variables, f"step-{number}")
        return {f"eval/{label}": result.value for label, result in results.items()}

    return Stage(
        name=config.name,
        steps=config.steps,
        first=first,
        step=jit_step(make_stage_step(stage, update), state, setup.sharder.device().platform),
        batches=batches,
        sharding=setup.sharder.batch(),
        log_every=setup.config.logging.every,
        evaluate_every=config.evaluate_every,
        evaluate=evaluate_now,
    )


def model_flops_per_token(stage: ResolvedStage) -> float:
    """`train_flops_per_token` of a stage's model, and the forward pass of the one it is compared with."""
    sizes, length = _matrices(stage.bound), stage.config.sequence_length
    trained = sum(size for path, size in sizes.items() if path[0] in stage.train)
    flops = train_flops_per_token(
        matmul_params=sum(sizes.values()), trained_matmul_params=trained, **_attention(stage.bound, length)
    )
    if stage.reference_in_step is None:
        return flops
    compared = stage.reference_in_step.bound
    return flops + forward_flops_per_token(
        matmul_params=sum(_matrices(compared).values()), **_attention(compared, length)
    )


def _matrices(bound: Bound) -> dict[tuple[str, ...], int]:
    """Sizes of what multiplies a token: kernels and low-rank factors, and the tied head once."""
    shapes = flatten_dict(jax.eval_shape(lambda rng: bound.init(rng), jax.random.key(0)))
    sizes = {path: leaf.value.size for path, leaf in shapes.items() if path[-1] not in ("scale", "bias")}
    if not bound.model.config.tie_embeddings:
        del sizes["params", "embed", "embedding"]
    return sizes


def _attention(bound: Bound, length: int) -> dict[str, int]:
    shape = bound.model.config
    width = shape.num_heads * shape.head_dim
    return {"num_layers": shape.num_layers, "attention_width": width, "sequence_length": length}


def _save_result(setup: Setup, variables: Variables) -> None:
    """`final/`: a Hugging Face directory, or an adapter where the only tuner is all that was trained.

    Tuners that can't be merged into the weights go beside them, into `final/tuners/`.
    """
    about, place, last = setup.about, setup.workdir / "final", setup.stages[-1]
    full = any("params" in stage.train for stage in setup.stages)
    tuners = list(zip(last.config.tuners, last.bound.tuners))
    if not full and len(tuners) == 1:
        _save_tuner(setup, place, *tuners[0], variables, base=setup.config.model.source)
        return
    merged = Bound(last.bound.model, tuple(tuner for tuner in last.bound.tuners if tuner.merge))
    params = merge(merged, variables)
    weights.export(place, about.config, params, about.tokenizer, generation_config=about.generation_config)
    for chosen, tuner in tuners:
        if not tuner.merge:
            _save_tuner(setup, place / weights.TUNERS / tuner.collection, chosen, tuner, variables, base="../..")


def _save_tuner(setup: Setup, place: epath.Path, chosen: ConfigDict, tuner: Tuner, variables, *, base: str) -> None:
    options = {key: value for key, value in thaw(chosen).items() if key not in ("name", "collection")}
    adapter = weights.Adapter(chosen.name, *plain(tuner, options, variables))
    weights.write_adapter(place, adapter, base=base, config=setup.about.config, tokenizer=setup.about.tokenizer)


def _evaluate(setup: Setup, bound: Bound, variables: Variables, when: str) -> dict[str, EvalResult]:
    # A language model that is yet to get its reward head is not asked what the reward model is.
    is_asked = bound.is_reward_model == setup.stages[-1].bound.is_reward_model
    specs = setup.config.evaluations if is_asked else ()
    specs += setup.config.baselines if when == "before" else ()
    if not specs:
        return {}
    return evaluate(setup.policy(bound, variables), specs, workdir=setup.workdir, when=when, note=setup.about.note)
