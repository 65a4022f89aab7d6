"""The stages of a recipe with their names resolved: once, for everything that asks."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from luthier.config import data as data_section
from luthier.config import resolve
from luthier.config import stage as stage_section
from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError, near
from luthier.models import Transformer
from luthier.objectives import START, Objective, TokenLoss
from luthier.objectives.build import Batching, Loss, batching, make_objective
from luthier.objectives.preference import Ranked, SequenceLoss
from luthier.objectives.reward import RewardRankings
from luthier.objectives.reward_objective import check_head
from luthier.optim.masks import Mask, masked
from luthier.training.reference import AVERAGE, Reference, collections_of, make_reference
from luthier.training.state import TrainState
from luthier.training.step import Average, Step, make_step
from luthier.tuners import Bound, bind

Variables = Mapping[str, Any]
_DEFAULTS = {
    name: inspect.signature(section).parameters[name].default
    for section, name in ((stage_section, "sync_every"), (data_section, "answers"))
}


@dataclasses.dataclass(frozen=True)
class ResolvedStage:
    """A stage of a recipe and what its names stand for.

    Attributes:
      recipe, config: the recipe, and this stage's section of it.
      bound: the model with the stage's tuners.
      train: the collections that it trains.
      loss: what it minimises.
      handed_on: the collections that it begins with; its tuners make the others.
    """

    recipe: ConfigDict
    config: ConfigDict
    bound: Bound
    train: tuple[str, ...]
    loss: Loss
    handed_on: frozenset[str]

    @functools.cached_property
    def reference(self) -> Reference | None:
        """The second model of the loss. Only here is a teacher looked at, which a finished stage may have lost."""
        source = self.loss.reference if isinstance(self.loss, TokenLoss) else self.config.reference or START
        if isinstance(self.loss, SequenceLoss) and not self.loss.needs_reference:
            source = ""
        if self.config.sync_reference:
            return Reference(self.bound, AVERAGE)
        what = "teacher" if isinstance(self.loss, TokenLoss) else "reference"
        return make_reference(source, self.bound, self.handed_on, self.recipe.mesh.rules, what)

    @property
    def reference_fingerprint(self) -> str:
        """Of the second model's own weights; "" where there are none, or a finished stage has lost them."""
        try:
            about = self.reference and self.reference.about
        except LuthierError:
            return ""
        return about.fingerprint if about else ""

    @property
    def average(self) -> Average | None:
        """The moving average that the state keeps: a better model to end with, or a reference that follows."""
        if self.config.sync_reference:
            return Average(1 - self.config.sync_reference, self.config.sync_every)
        return Average(self.config.ema) if self.config.ema else None

    def result(self, state: TrainState) -> Variables:
        """What the stage makes of what it trains."""
        return state.ema if self.config.ema else state.trainable

    @property
    def reference_in_step(self) -> Reference | None:
        """The reference, unless its log-probabilities come with the batch."""
        return None if self.config.cache_reference else self.reference

    @property
    def batching(self) -> Batching:
        """What the loss asks of the data."""
        return batching(self.loss, max(section.answers for section in _sections(self.config)))

    def objective(self) -> Objective:
        """What a step minimises; a cached reference comes with the batch."""
        model, beside = self.bound.model, self.reference_in_step
        options = {"reference": beside.bound if beside else None, "dropout": model.dropout > 0}
        return make_objective(self.loss, self.batching.answers, model.sharder, **options)


def resolve_stages(
    recipe: ConfigDict, model: Transformer, tokenizer: Tokenizer | None = None
) -> tuple[ResolvedStage, ...]:
    """The stages of a recipe on a model.

    Args:
      tokenizer: of the texts that tuners begin with; None where only shapes are asked for.

    Raises:
      LuthierError: for a name or option that is not known, a collection to train that is not there, and a tuner
        that a stage hands on to one without it.
    """
    stages, handed_on = [], frozenset({"params"})
    for config in recipe.stages:
        tuners = [resolve(chosen, "tuner")() for chosen in config.tuners]
        if tokenizer is not None:
            tuners = [tuner.tokenised(tokenizer.encode) if tuner.tokenised else tuner for tuner in tuners]
        bound = bind(model, tuners)
        there = collections_of(bound)
        if left := handed_on - there:
            raise LuthierError(
                f"the stage before hands on {', '.join(sorted(left))}, which this stage has no tuner for",
                where=f"stage {config.name}: tuners",
                mend="Attach the same tuner here",
            )
        _check_hand_on(recipe, config)
        loss = resolve(config.objective, "objective")()
        _check_loss(loss, config)
        check_head(loss, bound, f"stage {config.name}: objective")
        if bound.is_reward_model:
            _check_evaluations(recipe)
        stages.append(ResolvedStage(recipe, config, bound, _trained(config, bound), loss, handed_on))
        handed_on = there
    return tuple(stages)


def _check_evaluations(recipe: ConfigDict) -> None:
    """Raises a LuthierError for an evaluation that a reward model can't be asked."""
    for chosen in recipe.evaluations:
        if chosen.name != "preferences":
            raise LuthierError(
                f"a reward model can't be asked what {chosen.name!r} asks",
                where=f"evaluations: {chosen.label}",
                mend='Take spec("preferences")',
            )


def _trained(config: ConfigDict, bound: Bound) -> tuple[str, ...]:
    """The collections a stage trains: as told, else its tuners', else the model's own."""
    own = tuple(tuner.collection for tuner in bound.tuners)
    for name in config.train:
        if name not in ("params", *own):
            raise LuthierError(
                f"no collection {name!r} to train",
                where=f"stage {config.name}: train",
                mend=f"This stage has {', '.join(sorted(('params', *own)))}",
            )
    return tuple(config.train) or own or ("params",)


def _check_loss(loss: Loss, config: ConfigDict) -> None:
    """Raises a LuthierError for an option of the stage that the loss does not read, or can't keep."""
    compares = isinstance(loss, SequenceLoss) and loss.needs_reference
    for name in ("reference", "cache_reference", "sync_reference"):
        if config[name] and not compares:
            raise LuthierError(
                f"{config.objective.name!r} compares with no reference of the stage's",
                where=f"stage {config.name}: {name}",
                mend="Leave it out",
            )
    if config.sync_reference:
        _check_sync(config)
    elif config.sync_every != _DEFAULTS["sync_every"]:
        raise LuthierError(
            "no reference follows the policy",
            where=f"stage {config.name}: sync_every",
            mend="Set sync_reference too, or leave it out",
        )
    takes_any = isinstance(loss, SequenceLoss) and loss.inputs in (Ranked, RewardRankings)
    for section in () if takes_any else _sections(config):
        if section.answers != _DEFAULTS["answers"]:
            raise LuthierError(
                f"{config.objective.name!r} does not read answers={section.answers}",
                where=f"stage {config.name}: data.answers",
                mend='Leave it out, or take an objective of any number of answers, such as spec("infonca")',
            )
    if config.cache_reference and config.transforms:
        raise LuthierError(
            "transforms change the tokens of every step, and a cached reference has read them as they are",
            where=f"stage {config.name}: cache_reference",
            mend="Leave one of cache_reference and transforms out",
        )
    if isinstance(loss, SequenceLoss) and loss.coupled and config.micro_batches > 1:
        raise LuthierError(
            f"{config.objective.name!r} of an example depends on its whole batch: micro-batches would be another loss",
            where=f"stage {config.name}: micro_batches",
            mend="Set it to 1",
        )
    if isinstance(loss, SequenceLoss) and "shift" in loss.needs:
        raise LuthierError(
            "no recipe keeps the running mean of rewards that this loss is shifted by",
            where=f"stage {config.name}: objective",
            mend='Take spec("bco"), which is TRL\'s, without it',
        )


def _sections(config: ConfigDict) -> tuple[ConfigDict, ...]:
    """The sections of a stage's data, one or a mixture."""
    return config.data if isinstance(config.data, tuple) else (config.data,)


def _check_sync(config: ConfigDict) -> None:
    """Raises a LuthierError where the reference can't follow the policy."""
    for name in ("reference", "cache_reference", "ema"):
        if config[name]:
            raise LuthierError(
                f"the reference follows the policy, so there is no {name!r}",
                where=f"stage {config.name}: sync_reference",
                mend=f"Leave one of sync_reference and {name} out",
            )
    if config.train not in ((), ("params",)) or (config.tuners and not config.train):
        raise LuthierError(
            "the mean of two tuners is not the mean of what they do",
            where=f"stage {config.name}: sync_reference",
            mend="Train the model's own weights, train=('params',)",
        )
    if not 0 < config.sync_reference <= 1 or config.sync_every < 1:
        raise LuthierError(
            f"sync_reference={config.sync_reference:g} and sync_every={config.sync_every}",
            where=f"stage {config.name}",
            mend="Take a share above 0, at most 1, and at least one step",
        )


def _check_hand_on(recipe: ConfigDict, config: ConfigDict) -> None:
    """Raises a LuthierError if a stage ends with the best by an evaluation that it never runs."""
    evaluated = config.hand_on.removeprefix("-").removeprefix("eval/")
    if evaluated == config.hand_on.removeprefix("-"):
        return
    labels = [chosen.label for chosen in recipe.evaluations]
    if evaluated not in labels or not config.evaluate_every:
        raise LuthierError(
            f"{config.hand_on!r} is never measured during training",
            where=f"stage {config.name}: hand_on",
            mend=near(evaluated, labels) if evaluated not in labels else "Set evaluate_every",
        )


class Update(NamedTuple):
    """How a stage moves what it trains: the optimizer, its learning rate by step, and which weights it moves."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mask: Mask | None


def make_update(config: ConfigDict, trainable: Variables) -> Update:
    """The update of a stage; of `trainable` only shapes are looked at."""
    schedule, mask = resolve(config.schedule, "schedule")(config.steps), _mask(config, trainable)
    optimizer = resolve(config.optimizer, "optimizer")(schedule)
    return Update(masked(optimizer, mask) if mask else optimizer, schedule, mask)


def _mask(config: ConfigDict, trainable: Variables) -> Mask | None:
    """Which weights of the model a stage moves; tuners move whole."""
    if config.mask is None:
        return None
    if "params" not in trainable:
        raise LuthierError(
            f"{config.mask.name!r} masks the model's weights, and this stage does not train them",
            where=f"stage {config.name}: mask",
            mend="Leave mask out, or train=('params',)",
        )
    whole = {name: jax.tree.map(lambda _: True, tree) for name, tree in trainable.items()}
    return {**whole, "params": resolve(config.mask, "mask")(trainable["params"])}


def make_stage_step(stage: ResolvedStage, update: Update) -> Step:
    """The step that a stage runs."""
    config, model = stage.config, stage.bound.model
    return make_step(
        stage.bound,
        stage.objective(),
        update.optimizer,
        schedule=update.schedule,
        micro_batches=config.micro_batches,
        clip_norm=config.clip_norm,
        average=stage.average,
        reference_is_average=bool(config.sync_reference),
        transforms=[
            resolve(chosen, "transform")(config.steps, model.config.vocab_size) for chosen in config.transforms
        ],
        mask=update.mask,
        seed=stage.recipe.seed,
    )
