"""What a tuner is, and the one place that binds tuners to a model.

A tuner lives outside the model. It wraps the calls of the sites whose path matches one of its
patterns and keeps its numbers in a collection of its own. `bind` returns pure functions that enter
the interceptor inside each call, so tracing, rematerialisation and custom gradients see one function.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from luthier.errors import LuthierError
from luthier.models import KVCache, Transformer

Variables = Mapping[str, Any]
Transform = Callable[[nn.Module, Callable, tuple, Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Tuner:
    """One way to make a model trainable.

    Attributes:
      name: for messages.
      collection: where its variables live; one tuner each.
      patterns: regular expressions matched against the whole path of a site, such as
        `layers/attention/q`.
      site: the class of module it can wrap; other modules on a matching path are left alone.
      transform: `(site, call, args, kwargs) -> result`, where `call(*args, **kwargs)` is the site
        without this tuner.
      merge: `(params, variables) -> params` where the tuner can be folded into the weights.
    """

    name: str
    collection: str
    patterns: tuple[str, ...]
    site: type[nn.Module]
    transform: Transform
    merge: Callable[[Variables, Variables], Variables] | None = None

    def matches(self, module: nn.Module) -> bool:
        path = "/".join(module.path)
        return isinstance(module, self.site) and any(re.fullmatch(p, path) for p in self.patterns)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A model with its tuners: pure functions of `variables` (see docs/architecture.md)."""

    model: Transformer
    tuners: tuple[Tuner, ...] = ()

    def init(self, rng: jax.Array) -> Variables:
        """Fresh variables, leaves boxed with their logical axes; call under `jax.eval_shape` for shapes.

        Raises:
          LuthierError: if a pattern matches no site.
        """
        seen = {(t.name, p): False for t in self.tuners for p in t.patterns}
        one = jnp.ones((1, 1), jnp.int32)
        batch = {"tokens": one, "positions": one * 0, "segment_ids": one}
        variables = self._call("touch", None, batch, rngs={"params": rng}, seen=seen)
        for (name, pattern), found in seen.items():
            if not found:
                raise LuthierError(
                    f"pattern {pattern!r} matches no site",
                    where=f"tuner {name}",
                    mend="Sites are paths such as layers/attention/q, layers/mlp/up, head",
                )
        return variables

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
        """Logits `[..., V]` of hidden states `[..., E]`."""
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
                if tuner.matches(context.module):
                    if seen is not None:
                        path = "/".join(context.module.path)
                        seen.update({(tuner.name, p): True for p in tuner.patterns if re.fullmatch(p, path)})
                    call = _wrapped(tuner, context.module, call)
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            if variables is None:
                return self.model.init(rngs, *args, method=method)
            return self.model.apply(variables, *args, rngs=rngs, method=method)


def _wrapped(tuner: Tuner, module: nn.Module, call: Callable) -> Callable:
    return lambda *args, **kwargs: tuner.transform(module, call, args, kwargs)


def bind(model: Transformer, tuners: Sequence[Tuner] = ()) -> Bound:
    """Joins a model and its tuners; later tuners wrap earlier ones.

    Raises:
      LuthierError: if two tuners want the same collection, or one wants `params`.
    """
    taken = ["params"]
    for tuner in tuners:
        if tuner.collection in taken:
            raise LuthierError(
                f"collection {tuner.collection!r} is taken",
                where=f"tuner {tuner.name}",
                mend="Give this tuner another collection",
            )
        taken.append(tuner.collection)
    return Bound(model, tuple(tuners))


def merge(bound: Bound, variables: Variables) -> Variables:
    """The `params` with every tuner folded in.

    Raises:
      LuthierError: if a tuner cannot be merged.
    """
    params = variables["params"]
    for tuner in bound.tuners:
        if tuner.merge is None:
            raise LuthierError("this tuner has no exact merge", where=f"tuner {tuner.name}")
        params = tuner.merge(params, variables[tuner.collection])
    return params
