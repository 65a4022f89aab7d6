"""What a tuner is, and the one place that binds tuners to a model.

A tuner lives outside the model. It wraps the calls of the sites whose path matches one of its
patterns and keeps its numbers in a collection of its own. `bind` returns pure functions that enter
the interceptor inside each call, so tracing, rematerialisation and custom gradients see one function.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from luthier.errors import LuthierError, near
from luthier.models import KVCache, Transformer

Variables = Mapping[str, Any]
Transform = Callable[[nn.Module, Callable, tuple, Mapping[str, Any]], Any]


class Reparameterisation(NamedTuple):
    """Other numbers that are trained in place of those that the sites read.

    Attributes:
      init: `(rng, what the sites read) -> what is trained`, leaves boxed with their logical axes.
      apply: `(what is trained) -> what the sites read`.
    """

    init: Callable[[jax.Array, Variables], Variables]
    apply: Callable[[Variables], Variables]


@dataclasses.dataclass(frozen=True)
class Tuner:
    """One way to make a model trainable.

    Attributes:
      name: for messages.
      collection: where the numbers it trains live; one tuner each.
      patterns: regular expressions matched against the whole path of a site, such as
        `layers/attention/q`.
      site: the classes of module it can wrap; other modules on a matching path are left alone.
      transform: `(site, call, args, kwargs) -> result`, where `call(*args, **kwargs)` is the site
        without this tuner.
      merge: `(variables, frozen params) -> params` where the tuner can be folded into the weights: `variables`
        have the `params` with the tuners before it folded in, and the frozen ones have none.
      merge_rows: the same for what changes the input of a linear map, which scales the parts of all other tuners.
      frozen: collections of numbers that it reads and never trains.
      start: `variables -> its own collections`, where their start depends on the weights.
      plain: `variables -> (options, collection)` where not all options and numbers are needed once
        it is trained: those that say the same with the collection alone. `options` are the changed ones.
      through: numbers that are trained in place of those that the sites read.
      penalty: `variables -> scalar`, added to the loss while its collection is trained.
      tokenised: `encode -> Tuner` where options are texts: this tuner with a start from their token ids.
      reward: whether it puts a reward, `[..., 1]`, in place of the logits.
      prompt_length: placeholders (`prompt_slots`) that it fills in front of each example.
      prompts: how many soft prompts it has.
    """

    name: str
    collection: str
    patterns: tuple[str, ...]
    site: type[nn.Module] | tuple[type[nn.Module], ...]
    transform: Transform
    merge: Callable[[Variables, Variables], Variables] | None = None
    merge_rows: Callable[[Variables, Variables], Variables] | None = None
    frozen: tuple[str, ...] = ()
    start: Callable[[Variables], Variables] | None = None
    plain: Callable[[Variables], tuple[Mapping[str, Any], Variables]] | None = None
    through: Reparameterisation | None = None
    penalty: Callable[[Variables], jax.Array] | None = None
    tokenised: Callable[[Callable[[str], Sequence[int]]], "Tuner"] | None = None
    reward: bool = False
    prompt_length: int = 0
    prompts: int = 0

    @property
    def collections(self) -> tuple[str, ...]:
        """Everything of its own: trained, then frozen."""
        return (self.collection, *self.frozen)

    def matches(self, module: nn.Module) -> bool:
        path = "/".join(module.path)
        return isinstance(module, self.site) and any(re.fullmatch(p, path) for p in self.patterns)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A model with its tuners: pure functions of `variables` (see docs/architecture.md)."""

    model: Transformer
    tuners: tuple[Tuner, ...] = ()

    @property
    def prompt_tuner(self) -> Tuner | None:
        """The one that fills the placeholders of a soft prompt."""
        return next((tuner for tuner in self.tuners if tuner.prompt_length), None)

    @property
    def is_reward_model(self) -> bool:
        """Whether `unembed` gives a reward, `[..., 1]`, in place of logits."""
        return self.model.config.reward or any(tuner.reward for tuner in self.tuners)

    def init(self, rng: jax.Array) -> Variables:
        """Fresh variables, leaves boxed with their logical axes; call under `jax.eval_shape` for shapes.

        Raises:
          LuthierError: if a pattern matches no site.
        """
        seen = {tuner: set() for tuner in self.tuners}
        one = jnp.ones((1, 1), jnp.int32)
        batch = {"tokens": one, "positions": one * 0, "segment_ids": one}
        variables = self._call("touch", None, batch, rngs={"params": rng}, seen=seen)
        for tuner, sites in seen.items():
            for pattern in tuner.patterns:
                if not any(re.fullmatch(pattern, site) for site in sites):
                    where = f"tuner {tuner.name}"
                    raise LuthierError(f"pattern {pattern!r} matches no site", where=where, mend=near(pattern, sites))
        for tuner in self.tuners:
            if tuner.through:
                made = tuner.through.init(jax.random.fold_in(rng, 1), variables[tuner.collection])
                variables = {**variables, tuner.collection: made}
        return variables

    def start(self, variables: Variables, fresh: Collection[str]) -> Variables:
        """`variables` where the fresh collections have what their tuners take from the weights."""
        for tuner in self.tuners:
            if tuner.start and tuner.collection in fresh:
                variables = {**variables, **tuner.start(variables)}
        return variables

    def penalties(self, frozen: Variables, trainable: Variables) -> list[jax.Array]:
        """What its tuners that are trained add to the loss."""
        tuners = [tuner for tuner in self.tuners if tuner.penalty and tuner.collection in trainable]
        return [tuner.penalty({**frozen, **trainable}) for tuner in tuners]

    def hidden(
        self,
        variables: Variables,
        batch: Mapping[str, jax.Array],
        *,
        rngs: Mapping[str, jax.Array] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Final hidden states `[B, T, E]` and the cache after these tokens."""
        return self._call("__call__", variables, batch, cache, rngs=rngs)

    def unembed(self, variables: Variables, hidden: jax.Array) -> jax.Array:
        """Logits `[..., V]` of hidden states `[..., E]`, or a reward model's rewards `[..., 1]`."""
        return self._call("unembed", variables, hidden)

    def head(self, variables: Variables) -> Variables:
        """The part of `variables` that `unembed` reads."""
        roots = ("embed", "head") if self.model.config.tie_embeddings else ("head",)
        kept = {c: {root: tree[root] for root in roots if root in tree} for c, tree in variables.items()}
        return {collection: tree for collection, tree in kept.items() if tree}

    def _call(self, method: str, variables, *args, rngs=None, seen=None):
        def intercept(call, args, kwargs, context):
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            for tuner in self.tuners:
                if seen is not None and isinstance(context.module, tuner.site):
                    seen[tuner].add("/".join(context.module.path))
                if tuner.matches(context.module):
                    call = _wrapped(tuner, context.module, call)
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            if variables is None:
                return self.model.init(rngs, *args, method=method)
            return self.model.apply(self._read(variables), *args, rngs=rngs, method=method)

    def _read(self, variables: Variables) -> Variables:
        """What the sites read."""
        there = [t for t in self.tuners if t.through and t.collection in variables]
        return {**variables, **{t.collection: t.through.apply(variables[t.collection]) for t in there}}


def _wrapped(tuner: Tuner, module: nn.Module, call: Callable) -> Callable:
    return lambda *args, **kwargs: tuner.transform(module, call, args, kwargs)


def bind(model: Transformer, tuners: Sequence[Tuner] = ()) -> Bound:
    """Joins a model and its tuners; later tuners wrap earlier ones.

    Raises:
      LuthierError: if two tuners want the same collection, or one wants `params` or `reference`.
    """
    taken = ["params", "reference"]
    for tuner in tuners:
        for collection in tuner.collections:
            if collection in taken:
                raise LuthierError(
                    f"collection {collection!r} is taken",
                    where=f"tuner {tuner.name}",
                    mend="Give this tuner another collection",
                )
            taken.append(collection)
    if len(soft := [tuner.name for tuner in tuners if tuner.prompt_length]) > 1:
        raise LuthierError(f"{' and '.join(soft)} both fill the placeholders of a soft prompt", where="stage.tuners")
    return Bound(model, tuple(tuners))


def merge(bound: Bound, variables: Variables) -> Variables:
    """The `params` with every tuner folded in.

    Raises:
      LuthierError: if a tuner cannot be merged.
    """
    frozen = variables["params"]
    for tuner in bound.tuners:
        if tuner.merge is None:
            raise LuthierError("this tuner has no exact merge", where=f"tuner {tuner.name}")
        variables = {**variables, "params": tuner.merge(variables, frozen)}
    for tuner in bound.tuners:
        if tuner.merge_rows is not None:
            variables = {**variables, "params": tuner.merge_rows(variables, frozen)}
    return variables["params"]


def plain(tuner: Tuner, options: Mapping[str, Any], variables: Variables) -> tuple[dict[str, Any], Variables]:
    """What of a tuner is worth saving: options and numbers that say the same with one collection.

    Args:
      options: those that `tuner` was made with.
    """
    if tuner.plain is None:
        return dict(options), variables[tuner.collection]
    changed, numbers = tuner.plain(variables)
    return {**options, **changed}, numbers
