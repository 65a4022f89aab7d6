"""A run: a recipe from its config to a trained model, which can be killed at any moment."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from luthier import weights
from luthier.config import resolve, thaw
from luthier.data.batches import Batches, build
from luthier.data.chat import ChatTemplate
from luthier.decoding import Generation, Policy, Sampling, generate
from luthier.errors import LuthierError
from luthier.evals import EvalResult, evaluate, read_results
from luthier.models import ModelConfig, Transformer
from luthier.objectives import token_objective
from luthier.optim.masks import Mask, masked
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
from luthier.training.reference import check_reference, load_params, reference_of, reference_variables
from luthier.training.signals import Preemption
from luthier.training.state import TrainState, abstract_state, init_state, init_variables, split
from luthier.training.step import Step, check_batch, jit_step, make_step
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
    _evaluate(setup, setup.bind(()), variables, "before")
    with traced, Preemption() as preemption, contextlib.ExitStack() as open_files:
        writer, first = None, 0
        for index, stage in enumerate(config.stages):
            bound = setup.bind(stage.tuners)
            _check_handed_on(stage, bound, variables)
            variables = init_variables(bound, setup.sharder, config.seed + index, variables)
            train_names = trained_collections(stage, bound.tuners)
            trainable, frozen = split(variables, train_names)
            compared = reference_of(config, stage, bound)
            beside = frozen | reference_variables(stage, compared, variables, train_names)
            variables = None  # The state is donated: only its newest version may be held.
            update = make_update(stage, trainable)
            checkpoints = open_files.enter_context(_checkpoints(setup, stage))
            options = {"ema": bool(stage.ema), "loss_scale": config.model.compute_dtype == "float16"}
            state, start = _restored(checkpoints, trainable, update.optimizer, setup.sharder, options)
            del trainable  # A resumed run would hold the weights it started from as well.
            if start < stage.steps:
                if writer is None:
                    writer = open_files.enter_context(_writer(setup, first + start))
                state = run_stage(
                    _stage(setup, stage, bound, frozen, update, setup.batches[index], first),
                    state,
                    beside,
                    start=start,
                    checkpoints=checkpoints,
                    writer=writer,
                    throughput=Throughput.of_devices(
                        model_flops_per_token(bound, train_names, stage.sequence_length, compared)
                    ),
                    preemption=preemption,
                    profile=traced,
                    failures=workdir / "failures",
                )
            first += stage.steps
            variables = {**frozen, **(state.ema if stage.ema else state.trainable)}
            del state, frozen, beside
    _save_result(setup, bound, variables)
    _evaluate(setup, bound, variables, "after")
    return Run(workdir, config, setup.policy(bound, variables), read_results(workdir))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the stages of a run share: everything but the weights."""

    config: ConfigDict
    workdir: epath.Path
    about: weights.Description
    template: ChatTemplate | None
    sharder: Sharder
    batches: tuple[Batches, ...]

    def bind(self, tuners: Sequence[ConfigDict]) -> Bound:
        """The model with the tuners that a stage asks for."""
        return bind(self.model(), [resolve(chosen, "tuner")() for chosen in tuners])

    def model(self) -> Transformer:
        return make_model(self.config, self.about.config, self.sharder)

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
    for stage in config.stages:
        check_batch(stage.batch_size, stage.micro_batches, sharder)
    batches = tuple(_batches(config, stage, index, about, template) for index, stage in enumerate(config.stages))
    setup = Setup(config, workdir, about, template, sharder, batches)
    for stage in config.stages:
        trained_collections(stage, setup.bind(stage.tuners).tuners)
        check_reference(stage, about.tokenizer)
    fingerprints = {f"data.{stage.name}": made.fingerprint for stage, made in zip(config.stages, batches)}
    fingerprints |= {"model": about.fingerprint, "tokenizer": about.tokenizer.fingerprint}
    counts = {stage.name: made.counts for stage, made in zip(config.stages, batches)}
    mesh = sharder.mesh.shape
    record = manifests.Manifest.gather(config, fingerprints=fingerprints, data=counts, mesh=mesh, note=about.note)
    manifests.start(workdir, record)
    return setup, load_params(config.model.source, setup.bind(()), about)


def config_sharder(config: ConfigDict, shape: ModelConfig, devices=None) -> Sharder:
    """The mesh and sharding rules of a recipe over all devices, or the given ones."""
    mesh = make_mesh(**{axis: config.mesh[axis] for axis in AXES}, devices=devices)
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    return make_sharder(mesh, **heads, rules=config.mesh.rules)


def dry_run(config: ConfigDict, stage: int = 0) -> Batches:
    """The data of a stage, tokenised and planned, without weights or training."""
    about = weights.describe(config.model.source)
    return _batches(config, config.stages[stage], stage, about, _template(config, about))


def _template(config: ConfigDict, about: weights.Description) -> ChatTemplate | None:
    file = config.model.template
    source = epath.Path(file).read_text() if file else about.tokenizer.chat_template
    return ChatTemplate(source, about.tokenizer.special_tokens, name=file or "chat template") if source else None


def _batches(config: ConfigDict, stage: ConfigDict, index: int, about, template) -> Batches:
    tuners = [resolve(chosen, "tuner")() for chosen in stage.tuners]
    soft = next((tuner for tuner in tuners if tuner.prompt_length), None)
    for number, section in enumerate(stage.data if isinstance(stage.data, tuple) else (stage.data,)):
        if not 0 <= section.prompt < (soft.prompts if soft else 1):
            raise LuthierError(
                f"data[{number}].prompt is {section.prompt}, and there are {soft.prompts if soft else 0} soft prompts",
                where=f"stage {stage.name}",
                mend='Attach spec("prompt_tuning", prompts=...) with as many',
            )
    return build(
        stage.data,
        tokenizer=about.tokenizer,
        template=template,
        sequence_length=stage.sequence_length,
        batch_size=stage.batch_size,
        seed=config.seed + index,
        packing=stage.packing,
        prompt_length=soft.prompt_length if soft else 0,
    )


def trained_collections(stage: ConfigDict, tuners: Sequence[Tuner]) -> tuple[str, ...]:
    """The collections a stage trains: as told, else its tuners', else the model's own."""
    chosen = tuple(stage.train) or tuple(tuner.collection for tuner in tuners) or ("params",)
    there = {"params", *(tuner.collection for tuner in tuners)}
    for name in chosen:
        if name not in there:
            raise LuthierError(
                f"no collection {name!r} to train",
                where=f"stage {stage.name}: train",
                mend=f"This stage has {', '.join(sorted(there))}",
            )
    return chosen


def _check_handed_on(stage: ConfigDict, bound: Bound, variables: Variables) -> None:
    left = variables.keys() - {"params"} - {name for tuner in bound.tuners for name in tuner.collections}
    if left:
        raise LuthierError(
            f"the stage before hands on {', '.join(sorted(left))}, which this stage has no tuner for",
            where=f"stage {stage.name}: tuners",
            mend="Attach the same tuner here",
        )


class Update(NamedTuple):
    """How a stage moves what it trains: the optimizer, its learning rate by step, and which weights it moves."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mask: Mask | None


def make_update(stage: ConfigDict, trainable: Variables) -> Update:
    """The update of a stage; of `trainable` only shapes are looked at."""
    schedule, mask = resolve(stage.schedule, "schedule")(stage.steps), _mask(stage, trainable)
    optimizer = resolve(stage.optimizer, "optimizer")(schedule)
    return Update(masked(optimizer, mask) if mask else optimizer, schedule, mask)


def _mask(stage: ConfigDict, trainable: Variables) -> Mask | None:
    """Which weights of the model a stage moves; tuners move whole."""
    if stage.mask is None:
        return None
    if "params" not in trainable:
        raise LuthierError(
            f"{stage.mask.name!r} masks the model's weights, and this stage does not train them",
            where=f"stage {stage.name}: mask",
            mend="Leave mask out, or train=('params',)",
        )
    whole = {name: jax.tree.map(lambda _: True, tree) for name, tree in trainable.items()}
    return {**whole, "params": resolve(stage.mask, "mask")(trainable["params"])}


def _checkpoints(setup: Setup, stage: ConfigDict) -> Checkpoints:
    chosen = setup.config.checkpoint
    return Checkpoints(
        setup.workdir / "checkpoints" / stage.name,
        every=chosen.every,
        keep_last=chosen.keep_last,
        keep_best=chosen.keep_best,
    )


def _restored(checkpoints: Checkpoints, trainable, optimizer, sharder, options: dict) -> tuple[TrainState, int]:
    found = checkpoints.restore(abstract_state(trainable, optimizer, sharder, **options))
    if found is None:
        return init_state(trainable, optimizer, sharder, **options), 0
    log.info("going on after step %d of %s", found[1], checkpoints.directory.name)
    return found


def _writer(setup: Setup, resume_step: int) -> MetricsWriter:
    chosen = setup.config.logging
    return MetricsWriter(setup.workdir, tensorboard=chosen.tensorboard, wandb=chosen.wandb, resume_step=resume_step)


def _stage(setup: Setup, stage: ConfigDict, bound: Bound, frozen, update: Update, batches, first: int) -> Stage:
    step = make_stage_step(setup.config, stage, bound, update, setup.sharder)

    def evaluate_now(state: TrainState, number: int) -> dict[str, float]:
        variables = {**frozen, **(state.ema if stage.ema else state.trainable)}
        results = _evaluate(setup, bound, variables, f"step-{number}")
        return {f"eval/{label}": result.value for label, result in results.items()}

    return Stage(
        name=stage.name,
        steps=stage.steps,
        first=first,
        step=jit_step(step, setup.sharder.device().platform),
        batches=batches,
        sharding=setup.sharder.batch(),
        log_every=setup.config.logging.every,
        evaluate_every=stage.evaluate_every,
        evaluate=evaluate_now,
    )


def make_stage_step(config: ConfigDict, stage: ConfigDict, bound: Bound, update: Update, sharder: Sharder) -> Step:
    """The step that a stage of a recipe runs."""
    loss = resolve(stage.objective, "objective")()
    reference, vocabulary = reference_of(config, stage, bound), bound.model.config.vocab_size
    return make_step(
        bound,
        token_objective(loss, sharder, reference=reference, dropout=config.model.dropout > 0),
        update.optimizer,
        schedule=update.schedule,
        micro_batches=stage.micro_batches,
        clip_norm=stage.clip_norm,
        ema=stage.ema,
        transforms=[resolve(chosen, "transform")(stage.steps, vocabulary) for chosen in stage.transforms],
        mask=update.mask,
        seed=config.seed,
    )


def model_flops_per_token(
    bound: Bound, train_names: Sequence[str], length: int, reference: Bound | None = None
) -> float:
    """`train_flops_per_token` of a bound model, and the forward pass of the one it is compared with."""
    sizes = _matrices(bound)
    trained = sum(size for path, size in sizes.items() if path[0] in train_names)
    flops = train_flops_per_token(
        matmul_params=sum(sizes.values()), trained_matmul_params=trained, **_attention(bound, length)
    )
    if reference is None:
        return flops
    return flops + forward_flops_per_token(
        matmul_params=sum(_matrices(reference).values()), **_attention(reference, length)
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


def _save_result(setup: Setup, bound: Bound, variables: Variables) -> None:
    """`final/`: a Hugging Face directory, or an adapter where the only tuner is all that was trained.

    Tuners that can't be merged into the weights go beside them, into `final/tuners/`.
    """
    about, place, stages = setup.about, setup.workdir / "final", setup.config.stages
    full = any("params" in trained_collections(stage, setup.bind(stage.tuners).tuners) for stage in stages)
    tuners = list(zip(stages[-1].tuners, bound.tuners))
    if not full and len(tuners) == 1:
        _save_tuner(setup, place, *tuners[0], variables, base=setup.config.model.source)
        return
    merged = Bound(bound.model, tuple(tuner for tuner in bound.tuners if tuner.merge))
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
    specs = setup.config.evaluations + (setup.config.baselines if when == "before" else ())
    if not specs:
        return {}
    return evaluate(setup.policy(bound, variables), specs, workdir=setup.workdir, when=when, note=setup.about.note)
