"""The second model that an objective compares with: the model as its stage begins, or a teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from luthier import weights
from luthier.config import resolve, spec
from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError
from luthier.objectives import START
from luthier.parallel import make_sharder
from luthier.tuners import Bound, bind, merge

Variables = Mapping[str, Any]


def reference_of(config: ConfigDict, stage: ConfigDict, bound: Bound) -> Bound | None:
    """The bound model that a stage's objective compares with, or None.

    At its start, the policy is what the stage before hands on: tuners that begin in this stage are left out.

    Raises:
      LuthierError: if a teacher is not there.
    """
    source = resolve(stage.objective, "objective")().reference
    if not source:
        return None
    if source == START:
        handed_on = _collections_before(config, stage)
        return Bound(bound.model, tuple(tuner for tuner in bound.tuners if tuner.collection in handed_on))
    shape = weights.describe(source).config
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    sharder = make_sharder(bound.model.sharder.mesh, **heads, rules=config.mesh.rules)
    return bind(bound.model.clone(config=shape, dropout=0.0, remat="none", sharder=sharder))


def check_reference(stage: ConfigDict, tokenizer: Tokenizer) -> None:
    """Raises a LuthierError if a teacher's tokens mean something else than the model's."""
    source = resolve(stage.objective, "objective")().reference
    if source in ("", START):
        return
    theirs = weights.describe(source).tokenizer.vocabulary()
    ours = tokenizer.vocabulary()
    if odd := next((token for token in ours if theirs.get(token) != ours[token]), None):
        raise LuthierError(
            f"its token {odd!r} is {theirs.get(odd)}, the model's is {ours[odd]}: logits can't be compared",
            where=f"stage {stage.name}: teacher {source}",
            mend="Take a teacher with the same tokenizer",
        )


def reference_variables(
    stage: ConfigDict, reference: Bound | None, variables: Variables, train_names: Sequence[str]
) -> dict[str, Variables]:
    """What the step needs beside its own variables: the collection `reference`, or nothing.

    Args:
      variables: as the stage begins; of what it trains a copy is kept.
    """
    if reference is None:
        return {}
    source = resolve(stage.objective, "objective")().reference
    if source != START:
        return {"reference": {"params": load_params(source, reference)}}
    names = collections_of(reference)
    if not names & set(train_names):
        return {}
    copied = lambda name: jax.tree.map(jnp.copy, variables[name]) if name in train_names else variables[name]  # noqa: E731
    return {"reference": {name: copied(name) for name in names}}


def collections_of(bound: Bound) -> set[str]:
    """The collections that a bound model reads."""
    return {"params", *(name for tuner in bound.tuners for name in tuner.collections)}


def load_params(source: str, bound: Bound, about: weights.Description | None = None) -> Variables:
    """Pretrained weights on the model's mesh, with the adapters of the source folded in."""
    boxed = jax.eval_shape(bound.init, jax.random.key(0))["params"]
    shardings = flatten_dict(bound.model.sharder.tree(boxed), sep="/")
    loaded = weights.load(source, place=lambda path, shape: shardings[path], about=about)
    params = loaded.params
    for adapter in loaded.adapters:
        tuner = resolve(spec(adapter.name, **adapter.options), "tuner")()
        params = merge(bind(bound.model, [tuner]), {"params": params, tuner.collection: adapter.variables})
    return params


def _collections_before(config: ConfigDict, stage: ConfigDict) -> set[str]:
    """Tuner collections that the stage before hands on."""
    index = [one.name for one in config.stages].index(stage.name)
    before = config.stages[index - 1].tuners if index else ()
    return {resolve(chosen, "tuner")().collection for chosen in before}
