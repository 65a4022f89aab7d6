"""The second model that an objective compares with: the model as its stage begins, or a teacher."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from luthier import weights
from luthier.config import resolve, spec
from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError
from luthier.objectives import START
from luthier.parallel import make_sharder
from luthier.tuners import Bound, bind, merge

Variables = Mapping[str, Any]
AVERAGE = "average"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A second model, which gets no gradient.

    Attributes:
      bound: the model, with those of its tuners that are not new.
      source: of a teacher's weights; `START` for the model as its stage begins, `AVERAGE` for one that follows the
        policy and lies in the state.
      about: what is known of a teacher without its weights.
      what: what it is called: a `teacher` of token losses, a `reference` of those of whole answers.
    """

    bound: Bound
    source: str
    about: weights.Description | None = None
    what: str = "teacher"

    def has_own_variables(self, train: Sequence[str]) -> bool:
        """Whether its numbers are, or become, others than those of the state and of what stays as it is."""
        return self.source != AVERAGE and (self.about is not None or bool(collections_of(self.bound) & set(train)))


def make_reference(
    source: str, policy: Bound, handed_on: Collection[str], rules: Sequence[tuple], what: str = "teacher"
) -> Reference | None:
    """The reference model that a loss asks for, or None.

    At its start, the policy is what the stage before hands on: tuners that begin in this stage are left out.

    Args:
      source: `TokenLoss.reference`.
      handed_on: collections of the stage before.
      rules: sharding rules of the recipe.
      what: `Reference.what`.

    Raises:
      LuthierError: if a teacher is not there.
    """
    if not source:
        return None
    if source == START:
        tuners = tuple(tuner for tuner in policy.tuners if tuner.collection in handed_on)
        return Reference(Bound(policy.model, tuners), START, what=what)
    about = weights.describe(source)
    heads = {"num_heads": about.config.num_heads, "num_kv_heads": about.config.num_kv_heads}
    sharder = make_sharder(policy.model.sharder.mesh, **heads, rules=rules)
    model = policy.model.clone(config=about.config, dropout=0.0, remat="none", sharder=sharder)
    return Reference(bind(model), source, about, what)


def check_reference(reference: Reference | None, tokenizer: Tokenizer, where: str) -> None:
    """Raises a LuthierError if the tokens of a second model of its own mean something else than the model's."""
    if reference is None or reference.about is None:
        return
    theirs, ours = reference.about.tokenizer.vocabulary(), tokenizer.vocabulary()
    if odd := next((token for token in ours if theirs.get(token) != ours[token]), None):
        raise LuthierError(
            f"its token {odd!r} is {theirs.get(odd)}, the model's is {ours[odd]}: probabilities can't be compared",
            where=f"{where}: {reference.what} {reference.source}",
            mend=f"Take a {reference.what} with the same tokenizer",
        )


def reference_variables(reference: Reference | None, variables: Variables, train: Sequence[str]) -> dict[str, Any]:
    """What the step needs beside its own variables: the collection `reference`, or nothing.

    Args:
      variables: as the stage begins; of what it trains a copy is kept.
      train: the collections that it trains.
    """
    if reference is None or not reference.has_own_variables(train):
        return {}
    if reference.about is not None:
        return {"reference": {"params": load_params(reference.source, reference.bound, reference.about)}}
    copied = lambda name: jax.tree.map(jnp.copy, variables[name]) if name in train else variables[name]  # noqa: E731
    return {"reference": {name: copied(name) for name in collections_of(reference.bound)}}


def collections_of(bound: Bound) -> frozenset[str]:
    """The collections that a bound model reads."""
    return frozenset({"params", *(name for tuner in bound.tuners for name in tuner.collections)})


def load_params(source: str, bound: Bound, about: weights.Description) -> Variables:
    """Pretrained weights on the model's mesh, with the adapters of the source folded in."""
    boxed = jax.eval_shape(bound.init, jax.random.key(0))["params"]
    shardings = flatten_dict(bound.model.sharder.tree(boxed), sep="/")
    loaded = weights.load(source, place=lambda path, shape: shardings[path], about=about)
    tuners = [
        resolve(spec(adapter.name, **adapter.options, collection=f"adapter_{number}"), "tuner")()
        for number, adapter in enumerate(loaded.adapters)
    ]
    if any(tuner.reward for tuner in tuners):
        mend = "Make one directory of it and its model: luthier export --merge"
        raise LuthierError("a reward head beside its model can't be trained on", where=source, mend=mend)
    laid_over = {tuner.collection: adapter.variables for tuner, adapter in zip(tuners, loaded.adapters)}
    return merge(bind(bound.model, tuners), {"params": loaded.params, **laid_over})
