"""Preference and reward losses against TRL's own, and what it lacks against NumPy and limits."""

import functools
import itertools

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier.errors import LuthierError
from luthier.objectives import reward
from luthier.objectives.preference import Pairs, Ranked, Unpaired, combine, length_desensitised, tail_weights, wpo
from luthier.objectives.preference import pairs as of_pairs
from luthier.objectives.preference import ranked as of_ranked
from luthier.objectives.preference import reference_free as free
from luthier.objectives.preference import unpaired as of_unpaired

ORDINARY = 8
SMOOTHED = {"label_smoothing": 0.1}
DIVERGENCES = {
    "forward_kl": {"divergence": "forward_kl"},
    "js_divergence": {"divergence": "js"},
    "alpha_divergence": {"divergence": "alpha", "alpha": 0.5},
}
DIVERGING = {
    "dpo": of_pairs.dpo,
    "hinge": of_pairs.hinge,
    "ipo": of_pairs.ipo,
    "sigmoid_norm": of_pairs.sigmoid_norm,
    "exo": functools.partial(of_pairs.exo, **SMOOTHED),
    "robust": functools.partial(of_pairs.robust, **SMOOTHED),
    "discopop": of_pairs.discopop,
}
PAIRS = {
    **{name: make(beta=2.0 if name == "sigmoid_norm" else 0.1) for name, make in DIVERGING.items()},
    "nca": of_pairs.nca(beta=0.1),
    "bco": of_pairs.bco(),
    "sppo": of_pairs.sppo(beta=0.1),
    "apo_zero": of_pairs.apo_zero(),
    "apo_down": of_pairs.apo_down(),
    "wpo": wpo(loss=of_pairs.dpo()),
    **{f"{a}/{b}": make(beta=0.1, **options) for a, make in DIVERGING.items() for b, options in DIVERGENCES.items()},
}
COUPLED = {
    "aot": of_pairs.aot(),
    "aot/smoothed": of_pairs.aot(**SMOOTHED),
    "aot_unpaired": of_pairs.aot_unpaired(),
    "aot_unpaired/smoothed": of_pairs.aot_unpaired(**SMOOTHED),
    "sft": free.chosen_sft(),
}
OF_MEANS = {
    "cpo": free.cpo(nll_weight=0.0),
    "cpo/smoothed": free.cpo(nll_weight=0.0, **SMOOTHED),
    "cpo/hinge": free.cpo(nll_weight=0.0, link="hinge"),
    "cpo/ipo": free.cpo(nll_weight=0.0, link="ipo"),
    "simpo": free.simpo(gamma=0.5),
    "simpo/smoothed": free.simpo(gamma=0.5, **SMOOTHED),
    "alphapo": free.alphapo(gamma=0.5),
    "alphapo/negative": free.alphapo(gamma=0.5, alpha=-0.5),
    "orpo": free.orpo(),
}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(hf_layout.GOLDENS / "preference.npz"))


@pytest.fixture(scope="module")
def pairs(golden):
    """The golden's pairs, ordinary and extreme, with every optional field."""
    data = {name: golden[f"pairs/{name}"] for name in ("policy", "reference", "log_sum_sq", "mask")}
    tokens = data["mask"].sum(1)
    alignment = ((data["policy"] - data["log_sum_sq"]) * data["mask"]).sum(1) / tokens
    sides = lambda x: jnp.asarray(x).reshape(2, -1)  # noqa: E731
    policy, reference, tokens, alignment = map(
        sides, (data["policy"].sum(1), data["reference"].sum(1), tokens, alignment)
    )
    return Pairs(
        *(*policy, *reference, *tokens),
        chosen_nll=-policy[0],
        chosen_alignment=alignment[0],
        rejected_alignment=alignment[1],
        shift=jnp.float32(0.3),
    )


def rows(inputs, which):
    return jax.tree.map(lambda x: x[which] if x.ndim else x, inputs)


def evaluate(loss, inputs, wrt=("chosen", "rejected"), jit=False):
    """Losses, metrics, and gradients of the losses' sum `[len(wrt), ...]`."""

    def total(fields):
        values, metrics = loss(inputs._replace(**fields))
        return jnp.sum(values), (values, metrics)

    fields = {name: getattr(inputs, name) for name in wrt}
    run = jax.grad(total, has_aux=True)  # operation by operation: inputs of one shape share what is compiled
    gradient, (values, metrics) = (jax.jit(run) if jit else run)(fields)
    return np.asarray(values), metrics, np.stack([gradient[name] for name in wrt])


def call(loss, inputs):
    return jax.jit(loss)(inputs)


def differences(formula, x, step=1e-4):
    """∂ Σ formula / ∂x in float64, by central differences."""
    x = np.asarray(x, np.float64)
    moves = step * np.eye(x.size).reshape(x.size, *x.shape)
    slopes = [np.sum(formula(x + move)) - np.sum(formula(x - move)) for move in moves]
    return np.reshape(slopes, x.shape) / (2 * step)


def assert_is(formula, loss, inputs, wrt):
    """Values and gradients are those of a NumPy formula of the fields `wrt`, in float64; returns the metrics."""
    values, metrics, gradient = evaluate(loss, inputs, wrt, jit=True)
    x = np.stack([np.asarray(getattr(inputs, name), np.float64) for name in wrt])
    np.testing.assert_allclose(values, formula(*x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, differences(lambda x: formula(*x), x), rtol=1e-5, atol=1e-6)
    return metrics


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def coarse(inputs):
    """In bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, inputs)


def mean(metric):
    values, counted = metric
    return float(np.sum(np.where(counted, values, 0)) / np.sum(counted))


def assert_equal_where_finite(ours, theirs):
    """Equal where theirs is a number; a number everywhere."""
    assert np.isfinite(ours).all()
    finite = np.isfinite(theirs)
    assert finite.mean() > 0.6
    np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_equal_trl(golden, pairs, name):
    values, metrics, gradient = evaluate(PAIRS[name], pairs)
    assert_equal_where_finite(values, golden[f"{name}/loss"])
    number = np.isfinite(golden[f"{name}/loss"])
    assert_equal_where_finite(gradient, np.where(number, golden[f"{name}/gradient"], np.nan))
    if name == "dpo":
        ordinary = rows(metrics, slice(ORDINARY))
        theirs = {key.removeprefix("metrics/"): x for key, x in golden.items() if key.startswith("metrics/")}
        assert theirs.keys() == ordinary.keys()
        for key, expected in theirs.items():
            assert mean(ordinary[key]) == pytest.approx(expected, rel=1e-5), key


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_equal_trl(golden, pairs, name):
    """TRL had the ordinary pairs alone: the others don't count."""
    padded = pairs._replace(valid=jnp.arange(len(pairs.chosen)) < ORDINARY)
    tokens = pairs.chosen_tokens[:ORDINARY]
    padded = padded._replace(chosen_nll=-pairs.chosen * (ORDINARY / tokens.sum()))
    wrt = ("chosen_nll",) if name == "sft" else ("chosen", "rejected")
    values, metrics, gradient = evaluate(COUPLED[name], padded, wrt)
    np.testing.assert_allclose(values.sum() / ORDINARY, golden[f"{name}/loss"], rtol=1e-5)
    assert not values[ORDINARY:].any() and not gradient[:, ORDINARY:].any()
    assert all(not counted[ORDINARY:].any() for _, counted in metrics.values())
    if name != "sft":
        np.testing.assert_allclose(gradient[:, :ORDINARY] / ORDINARY, golden[f"{name}/gradient"], atol=1e-6)


def test_length_desensitised_equals_trl(golden):
    """LD-DPO: sums over tokens with these weights, of the policy and of the reference."""
    take = lambda name: golden[f"pairs/{name}"].reshape(2, -1, 7)[:, :ORDINARY]  # noqa: E731
    mask, reference = take("mask"), take("reference")
    weights = tail_weights(jnp.arange(7), mask.sum(-1).min(0)[:, None], alpha=0.3)

    def mean_loss(policy):
        return jnp.mean(of_pairs.dpo()(Pairs(*(policy * weights).sum(-1), *(reference * weights).sum(-1)))[0])

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(jnp.asarray(take("policy")))
    np.testing.assert_allclose(loss, golden["ld/loss"], rtol=1e-6)
    theirs = golden["ld/gradient"].reshape(2, -1, 7)
    np.testing.assert_allclose(np.where(mask, gradient, 0), np.where(mask, theirs, 0), atol=1e-6)


@pytest.mark.parametrize("name", OF_MEANS)
def test_reference_free_equal_trl(golden, name):
    """Of sums over unequal numbers of tokens; powers of two, so that the means are TRL's to the bit."""
    chosen, rejected = (jnp.asarray(golden[f"means/{side}"]) for side in ("chosen", "rejected"))
    place = jnp.arange(len(chosen))
    sums = name.startswith("cpo") and name != "cpo/ipo"
    tokens = jnp.stack([place * 0 + 1] * 2 if sums else [2 ** (place % 4), 2 ** (4 - place % 3)])
    inputs = Pairs(
        *(chosen * tokens[0], rejected * tokens[1]),
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        chosen_nll=chosen * 0,
    )
    values, metrics, gradient = evaluate(OF_MEANS[name], inputs)
    assert_equal_where_finite(values, golden[f"{name}/loss"])
    assert_equal_where_finite(gradient * np.asarray(tokens), golden[f"{name}/gradient"])
    np.testing.assert_array_equal(metrics["logps/rejected"][0], rejected)
    if name == "cpo/smoothed":  # conservative DPO is the same function of log-ratios; TRL's DPO leaves smoothing out
        values, _, gradient = evaluate(of_pairs.dpo(**SMOOTHED), Pairs(chosen, rejected, chosen * 0, rejected * 0))
        np.testing.assert_allclose(values, golden[f"{name}/loss"], rtol=1e-5)
        np.testing.assert_allclose(gradient, golden[f"{name}/gradient"], atol=1e-6)


def test_orpo_near_probability_one():
    """Against float64 on both sides of certainty, and finite at certainty."""
    a = -np.array([1e-12, 1e-7, 1e-3, 0.5, 2.0, 40.0])
    chosen, rejected = (x.ravel() for x in np.meshgrid(a, a))
    log_odds = lambda x: x - np.log(-np.expm1(x))  # noqa: E731
    expected = 0.1 * np.logaddexp(0, log_odds(rejected) - log_odds(chosen))
    certain = np.array([[0, 0], [0, -1], [-1, 0]]).T
    sides = (jnp.asarray(np.append(x, y)) for x, y in zip((chosen, rejected), certain))
    ones = jnp.ones(len(chosen) + 3)
    inputs = Pairs(*sides, chosen_tokens=ones, rejected_tokens=ones, chosen_nll=0 * ones)
    values, _, gradient = evaluate(free.orpo(), inputs, jit=True)
    np.testing.assert_allclose(values[:-3], expected, rtol=1e-5, atol=1e-7)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["kto", "kto/clamped", "kto/weighted", "apo_zero_unpaired"])
def test_unpaired_equal_trl(golden, name):
    policy, reference = (jnp.asarray(golden[f"unpaired/{side}"]) for side in ("policy", "reference"))
    kl = (jnp.asarray(golden[f"{name}/kl_logprob"]), reference[1])
    inputs = Unpaired(policy[0], reference[0], jnp.asarray(golden["unpaired/label"]), None, *kl)
    loss = {
        "kto/weighted": of_unpaired.kto(desirable_weight=1.5, undesirable_weight=0.7),
        "apo_zero_unpaired": of_unpaired.apo_zero_unpaired(desirable_weight=1.5),
    }.get(name, of_unpaired.kto())
    values, metrics, (gradient, of_kl) = evaluate(loss, inputs, ("logprob", "kl_logprob"))
    np.testing.assert_allclose(values.mean(), golden[f"{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient / len(values), golden[f"{name}/gradient"], atol=1e-6)
    assert not of_kl.any()
    for key, metric in metrics.items():
        assert mean(metric) == pytest.approx(golden[f"{name}/metrics/{key}"], rel=1e-5, abs=1e-6), key
    margin = mean(metrics["rewards/chosen"]) - mean(metrics["rewards/rejected"])
    assert margin == pytest.approx(golden[f"{name}/metrics/rewards/margins"], rel=1e-5)
    assert ("rewards/margins" in metrics) == loss.coupled
    alike = inputs._replace(valid=inputs.desirable)
    if loss.coupled:  # TRL logs none without the others
        assert not call(loss, alike)[1]["rewards/margins"][1].any()


@pytest.mark.parametrize(
    "name, options",
    [("bradley_terry", {}), ("bradley_terry/margin", {"margin": True}), ("bradley_terry/centred", {"centring": 0.01})],
)
def test_bradley_terry_equals_trl(golden, name, options):
    inputs = reward.RewardPairs(*(jnp.asarray(golden[f"rewards/{side}"]) for side in ("chosen", "rejected", "margin")))
    values, _, gradient = evaluate(reward.bradley_terry(**options), inputs)
    assert_equal_where_finite(values, golden[f"{name}/loss"])
    assert_equal_where_finite(gradient, golden[f"{name}/gradient"])


def test_other_reward_losses():
    """Against loops over pairs in NumPy, and their differences."""
    rng = np.random.default_rng(0)
    rewards, scores = rng.normal(size=(5, 4)).astype(np.float32), rng.integers(0, 3, (5, 4))
    present = np.arange(4) < np.array([4, 3, 2, 4, 4])[:, None]
    scores[3] = 1

    def ranked(rewards):
        each = [
            [
                -log_sigmoid(rewards[row, i] - rewards[row, k])
                for i, k in itertools.permutations(np.flatnonzero(present[row]), 2)
                if scores[row, i] > scores[row, k]
            ]
            for row in range(5)
        ]
        return np.array([np.mean(one) if one else 0 for one in each])

    inputs = reward.RewardRankings(*map(jnp.asarray, (rewards, scores, present)))
    metrics = assert_is(ranked, reward.ranking(), inputs, ("reward",))
    assert ranked(rewards)[3] == 0 and not metrics["accuracy"][1][3]
    x, label = rewards[:, 0], scores[:, 0] > 0
    labelled = lambda x: -log_sigmoid(np.where(label, x, -x))  # noqa: E731
    inputs = reward.RewardLabels(jnp.asarray(x), jnp.asarray(label))
    metrics = assert_is(labelled, reward.binary_discrimination(), inputs, ("reward",))
    assert mean(metrics["accuracy"]) == pytest.approx(np.mean((x > 0) == label))
    inputs = reward.RewardPairs(*map(jnp.asarray, rewards.T))
    pretrained = lambda a, b, nll: -log_sigmoid(a - b) + 0.5 * nll  # noqa: E731
    assert_is(pretrained, reward.preference_pretraining(nll_weight=0.5), inputs, ("chosen", "rejected", "chosen_nll"))
    compared = lambda a, b: -log_sigmoid(a - b - rewards[:, 2]) + 0.3 * (a + b) ** 2  # noqa: E731
    assert_is(compared, reward.bradley_terry(margin=True, centring=0.3), inputs, ("chosen", "rejected"))


def answers(seed=0, examples=5, count=4):
    rng = np.random.default_rng(seed)
    logprob = -rng.uniform(1, 40, (examples, count))
    reference = logprob + rng.normal(0, 3, (examples, count))
    tokens = rng.integers(1, 9, (examples, count))
    return Ranked(*map(jnp.asarray, (logprob, reference, rng.normal(0, 4, (examples, count)), tokens)))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def likelihood_of_a_ranking(r, s, weights=(1, 1, 1)):
    best_first = r[np.argsort(-s)]
    return -sum(w * np.log(softmax(best_first[i:])[0]) for i, w in zip(range(len(r) - 1), weights))


# The loss of a prompt whose answers have the rewards r and the scores s.
SCORED = {
    "infonca": (of_ranked.infonca(temperature=2.0, beta=0.2), lambda r, s: -softmax(s / 2) @ np.log(softmax(r))),
    "nca_rewards": (
        of_ranked.nca_rewards(temperature=2.0, beta=0.2),
        lambda r, s: -softmax(s / 2) @ log_sigmoid(r) - log_sigmoid(-r).mean(),
    ),
    "multi_negative_dpo": (
        of_ranked.multi_negative_dpo(beta=0.2),
        lambda r, s: -np.mean([log_sigmoid(r[s.argmax()] - r[k]) for k in range(len(r)) if k != s.argmax()]),
    ),
    "plackett_luce_dpo": (of_ranked.plackett_luce_dpo(beta=0.2), likelihood_of_a_ranking),
    "plackett_luce_dpo/weighted": (
        of_ranked.plackett_luce_dpo(beta=0.2, weights=(0.5, 2.0, 0.0)),
        lambda r, s: likelihood_of_a_ranking(r, s, (0.5, 2, 0)),
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_scored_answers_equal_the_authors_formulas(name):
    """Values and gradients, prompt by prompt; of two prompts answers are absent, whatever fills their places."""
    loss, formula = SCORED[name]
    x = answers()
    present = ~np.isin(np.arange(20).reshape(5, 4), (4, 6, 13))
    reference, score = np.asarray(x.reference, np.float64), np.asarray(x.scores, np.float64)

    def restated(logprob):
        r = 0.2 * (logprob - reference)
        return np.array([formula(r[row, there], score[row, there]) for row, there in enumerate(present)])

    assert_is(restated, loss, x._replace(present=jnp.asarray(present)), ("logprob",))


@pytest.mark.parametrize("name", SCORED)
def test_answers_with_equal_scores_count_alike(name):
    """Three that are below the best, in another order: the same loss, and each has its own gradient as before."""
    x, order = answers(8), np.array([2, 1, 3, 0])
    scores = jnp.broadcast_to(jnp.array([1.0, 3.0, 1.0, 1.0]), x.scores.shape)
    other = x._replace(logprob=x.logprob[:, order], reference=x.reference[:, order], scores=scores)
    (values, _, gradient), (found, _, moved) = (
        evaluate(SCORED[name][0], one, ("logprob",), jit=True) for one in (x._replace(scores=scores), other)
    )
    np.testing.assert_allclose(found, values, rtol=1e-6)
    np.testing.assert_allclose(moved, gradient[..., order], rtol=1e-5, atol=1e-8)


def test_a_ranking_does_not_compare_equals():
    """Three equals below the best: only the best is drawn from all. Two pairs of equals: each of the upper ones is
    drawn from itself and the lower ones."""
    x = answers(9)
    r = 0.2 * np.asarray(x.logprob - x.reference, np.float64)
    rest = lambda *who: np.log(np.exp(r[:, who]).sum(1))  # noqa: E731
    for scores, expected in {
        (1.0, 3.0, 1.0, 1.0): rest(0, 1, 2, 3) - r[:, 1],
        (0.0, 2.0, 2.0, 0.0): rest(0, 1, 3) - r[:, 1] + rest(0, 2, 3) - r[:, 2],
    }.items():
        scored = x._replace(scores=jnp.broadcast_to(jnp.array(scores), r.shape))
        np.testing.assert_allclose(call(of_ranked.plackett_luce_dpo(beta=0.2), scored)[0], expected, rtol=1e-5)
    # The second weight is of the second place, which nobody has where two are first.
    weighted = of_ranked.plackett_luce_dpo(beta=0.2, weights=(0.5, 2.0, 4.0))
    both_first = x._replace(scores=jnp.broadcast_to(jnp.array((0.0, 2.0, 2.0, 1.0)), r.shape))
    expected = 0.5 * (rest(0, 1, 3) - r[:, 1] + rest(0, 2, 3) - r[:, 2]) + 4 * (rest(0, 3) - r[:, 3])
    np.testing.assert_allclose(call(weighted, both_first)[0], expected, rtol=1e-5)


def test_metrics_of_scored_answers():
    x = answers()
    r, score = 0.2 * np.asarray(x.logprob - x.reference, np.float64), np.asarray(x.scores)
    metrics = call(of_ranked.infonca(temperature=2.0, beta=0.2), x)[1]
    best, row = score.argmax(1), np.arange(len(r))
    beaten = [(r[i, best[i]] > np.delete(r[i], best[i])).mean() for i in row]
    assert mean(metrics["rewards/accuracies"]) == pytest.approx(np.mean(beaten))
    assert mean(metrics["rewards/chosen"]) == pytest.approx(r[row, best].mean(), rel=1e-5)
    rejected = np.mean([np.delete(r[i], best[i]) for i in row])
    assert mean(metrics["rewards/margins"]) == pytest.approx(r[row, best].mean() - rejected, rel=1e-5)


RANKED = {
    "infonca": (of_ranked.infonca(temperature=1e-3, beta=0.1), of_pairs.dpo()),
    "nca_rewards": (of_ranked.nca_rewards(temperature=1e-3, beta=0.1), of_pairs.nca(beta=0.1)),
    "multi_negative_dpo": (of_ranked.multi_negative_dpo(), of_pairs.dpo()),
    "plackett_luce_dpo": (of_ranked.plackett_luce_dpo(), of_pairs.dpo()),
}


@pytest.mark.parametrize("name", RANKED)
def test_two_answers_with_hard_labels_are_a_pair(name):
    """So are four of which two are absent, whatever fills their places."""
    ranked, paired = RANKED[name]
    x = jax.tree.map(np.array, answers(1))
    x.scores[:, 2:] += 100
    first, second = x.scores[:, :2].argmax(1), x.scores[:, :2].argmin(1)
    of = lambda values, index: jnp.asarray(np.take_along_axis(values, index[:, None], axis=1)[:, 0])  # noqa: E731
    sides = [of(values, index) for values in (x.logprob, x.reference) for index in (first, second)]
    expected, theirs, _ = evaluate(paired, Pairs(*sides), jit=True)
    x = jax.tree.map(jnp.asarray, x._replace(present=np.broadcast_to(np.arange(4) < 2, x.logprob.shape)))
    values, metrics, gradient = evaluate(ranked, x, ("logprob",), jit=True)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert np.isfinite(gradient).all() and not gradient[0, :, 2:].any()
    for key, metric in theirs.items():
        assert mean(metrics[key]) == pytest.approx(mean(metric), rel=1e-5), key


def test_plackett_luce_is_a_distribution_over_rankings():
    x = answers(2, examples=2, count=4)
    total, run = 0.0, jax.jit(of_ranked.plackett_luce_dpo())
    for ranking in itertools.permutations(range(4)):
        scores = jnp.broadcast_to(jnp.array(ranking, jnp.float32), (2, 4))
        total += np.exp(-np.asarray(run(x._replace(scores=scores))[0]))
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_weights_of_a_ranking():
    """Of three answers the second weight is of DPO on the lower two, the first of InfoNCA on all."""
    x = answers(4, count=3)
    x = x._replace(scores=jnp.broadcast_to(jnp.array([2.0, 3.0, 1.0]), x.scores.shape))
    weighted = lambda *w: call(of_ranked.plackett_luce_dpo(weights=w), x)[0]  # noqa: E731
    lower = Pairs(x.logprob[:, 0], x.logprob[:, 2], x.reference[:, 0], x.reference[:, 2])
    np.testing.assert_allclose(weighted(0.0, 1.0), call(of_pairs.dpo(), lower)[0], rtol=1e-5)
    best = call(of_ranked.infonca(temperature=1e-3, beta=0.1), x)[0]
    np.testing.assert_allclose(weighted(1.0, 0.0), best, rtol=1e-5)
    np.testing.assert_allclose(weighted(0.25, 2.0), 0.25 * weighted(1.0, 0.0) + 2 * weighted(0.0, 1.0), rtol=1e-5)
    for wrong in [(1.0,), (1.0, -1.0), (0.0, 0.0), ()]:
        with pytest.raises(LuthierError, match="weights"):
            weighted(*wrong)


def test_tapo_trades_the_polish_for_the_content():
    """Of a polished, a chosen and a rejected answer, wherever they lie, in closed form with its gradient."""
    x = answers(7, examples=6, count=3)
    places = np.array(list(itertools.permutations(range(3))))
    x = x._replace(scores=jnp.asarray(2.0 - np.argsort(places, axis=1)))
    r = np.take_along_axis(0.1 * np.asarray(x.logprob - x.reference, np.float64), places, axis=1)
    p, polish, content = np.exp(r) / np.exp(r).sum(1, keepdims=True), 0.3, 1.5
    wrong = 1 / (1 + np.exp(r[:, 1] - r[:, 2]))  # the model's probability that the rejected answer is the better
    expected = -polish * np.log(p[:, 0]) - content * np.log1p(-wrong)
    pull = polish * (p - [1, 0, 0]) + content * np.stack([0 * wrong, -wrong, wrong], axis=1)
    tapo = of_ranked.plackett_luce_dpo(weights=(polish, content))
    values, _, (gradient,) = evaluate(tapo, x, ("logprob",), jit=True)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(gradient, places, axis=1), 0.1 * pull, rtol=1e-5, atol=1e-7)


def test_clha_equals_the_authors_loops():
    x = answers(3, examples=6)
    tokens, score = np.asarray(x.tokens), np.asarray(x.scores)
    margin, sft_weight, examples, count = 3.0, 0.05, *score.shape

    def of_batch(logprob):
        means = logprob / tokens
        loss = np.mean(-sft_weight * (count - 1) ** 2 * logprob[:, 0] * (score[:, 0] > 0))
        for apart in range(1, count):
            each = [
                max(0.0, means[b, i + apart] - means[b, i] + margin * apart)
                for b, i in itertools.product(range(examples), range(count - apart))
                if abs(score[b, i] - score[b, i + apart]) > margin
            ]
            loss += np.mean(each)
        return loss

    values, _, (gradient,) = evaluate(of_ranked.clha(), x, ("logprob",), jit=True)
    np.testing.assert_allclose(values.mean(), of_batch(np.asarray(x.logprob)), rtol=1e-5)
    assert len(np.unique(np.sign(gradient))) == 3
    np.testing.assert_allclose(gradient / examples, differences(of_batch, x.logprob), rtol=1e-5, atol=1e-6)


def test_binary_classifier_optimisation(pairs):
    """With its δ, against NumPy; the paired loss is the unpaired one of both answers."""
    x = rows(pairs, slice(ORDINARY))
    references = [np.asarray(side, np.float64) for side in (x.ref_chosen, x.ref_rejected)]

    def restated(chosen, rejected):
        c, j = (0.1 * (side - reference) for side, reference in zip((chosen, rejected), references))
        return -log_sigmoid(c - 0.3) - log_sigmoid(0.3 - j)

    assert_is(restated, of_pairs.bco(shifted=True), x, ("chosen", "rejected"))
    both = [jnp.concatenate(sides) for sides in ((x.chosen, x.rejected), (x.ref_chosen, x.ref_rejected))]
    label = jnp.arange(2 * ORDINARY) < ORDINARY
    inputs = Unpaired(*both, label, shift=x.shift)
    values, _, (gradient,) = evaluate(of_unpaired.bco_unpaired(), inputs, ("logprob",), jit=True)
    sides = [np.asarray(side, np.float64) for side in (x.chosen, x.rejected)]
    np.testing.assert_allclose(values.reshape(2, -1).sum(0), restated(*sides), rtol=1e-5)
    slopes = differences(lambda both: restated(*both), np.stack(sides))
    np.testing.assert_allclose(gradient.reshape(2, -1), slopes, rtol=1e-5, atol=1e-6)


def test_the_start(pairs):
    """Where the policy is the reference: DPO is log 2, its gradients ∓β/2, NCA's ∓β/4; SPIN is DPO or the hinge."""
    start = pairs._replace(ref_chosen=pairs.chosen, ref_rejected=pairs.rejected)
    sides = np.array([[-1.0], [1.0]])
    values, _, gradient = evaluate(of_pairs.dpo(), start)
    np.testing.assert_allclose(values, np.log(2), rtol=1e-7)
    np.testing.assert_allclose(gradient - 0.1 / 2 * sides, 0, atol=1e-8)
    assert not evaluate(of_pairs.dpo(), start, ("ref_chosen", "ref_rejected"))[2].any()
    gradient = evaluate(of_pairs.nca(beta=0.1), start)[2]
    np.testing.assert_allclose(gradient - 0.1 / 4 * sides, 0, atol=1e-8)
    for link, same in (("logistic", of_pairs.dpo()), ("hinge", of_pairs.hinge())):
        np.testing.assert_array_equal(call(of_pairs.spin(link=link), pairs)[0], call(same, pairs)[0])


def test_limits_where_trl_overflows(golden, pairs):
    """c = −300, j = 300 under the forward KL, and −x for DiscoPOP at x → −∞."""
    assert not np.isfinite(golden["dpo/forward_kl/loss"][ORDINARY + 1])
    value = call(of_pairs.dpo(divergence="forward_kl"), pairs)[0][ORDINARY + 1]
    np.testing.assert_allclose(value, 0.1 * np.exp(80.0), rtol=1e-5)
    value = call(of_pairs.discopop(beta=1.0), pairs)[0][ORDINARY + 1]
    np.testing.assert_allclose(value, 600, rtol=1e-6)


@pytest.mark.parametrize("name, largest", [("dpo", 80.0), ("ipo", 40.0)])
def test_exponents_are_cut(name, largest):
    """Up to there the forward KL's own; beyond it the value stays and the gradient is 0. TRL's goes on to 88.7."""
    c, zero = -jnp.asarray([largest - 1, largest + 1, 88.0]), jnp.zeros(3)
    tokens = jnp.ones(3)
    inputs = Pairs(c, zero, zero, zero, chosen_tokens=tokens, rejected_tokens=tokens)
    values, _, gradient = evaluate(DIVERGING[name](beta=0.1, divergence="forward_kl"), inputs)
    own = np.exp([largest - 1, largest, largest])
    np.testing.assert_allclose(values, own**2 if name == "ipo" else 0.1 * own, rtol=1e-4)
    assert gradient[0][0] < 0 and not gradient[0][1:].any()


MICRO_BATCHED = {
    **{name: loss for name, loss in PAIRS.items() if "/" not in name},
    **COUPLED,
    **{name: OF_MEANS[name] for name in ("simpo", "alphapo", "orpo")},
    "cpo": free.cpo(),
}


@pytest.mark.parametrize("name", MICRO_BATCHED)
def test_parts_make_the_whole_unless_coupled(pairs, name):
    """Sums over two halves of a batch, each with the other half masked, are the sum over the batch."""
    loss, first = MICRO_BATCHED[name], jnp.arange(len(pairs.chosen)) < 4
    ordinary = jnp.arange(len(pairs.chosen)) < ORDINARY
    whole, *halves = (loss(pairs._replace(valid=valid))[0] for valid in (ordinary, first, ordinary & ~first))
    assert loss.coupled != np.allclose(whole, halves[0] + halves[1], rtol=1e-6)


def labelled(seed=2, examples=8):
    x = answers(seed, examples, 2)
    label = jnp.arange(examples) % 3 == 0
    kl = x.reference[:, 1] + jnp.arange(examples), x.reference[:, 1]  # the estimate of the KL is positive
    return Unpaired(x.logprob[:, 0], x.reference[:, 0], label, None, *kl, shift=jnp.float32(0.3))


def rewarded(kind):
    x = answers(5, 8)
    sides = x.logprob[:, 0] + 20, x.logprob[:, 1] + 20
    return {
        "pairs": reward.RewardPairs(*sides, jnp.abs(x.scores[:, 0]), x.tokens[:, 0] * 0.3),
        "labels": reward.RewardLabels(sides[0], x.scores[:, 0] > 0),
        "rankings": reward.RewardRankings(x.logprob + 20, x.scores),
    }[kind]


# Losses of other data than pairs, and what they read.
OTHERS = {
    "kto": (of_unpaired.kto(), labelled),
    "apo_zero_unpaired": (of_unpaired.apo_zero_unpaired(), labelled),
    "bco_unpaired": (of_unpaired.bco_unpaired(), labelled),
    "infonca": (of_ranked.infonca(temperature=2.0), lambda: answers(6, 8)),
    "nca_rewards": (of_ranked.nca_rewards(temperature=2.0), lambda: answers(6, 8)),
    "multi_negative_dpo": (of_ranked.multi_negative_dpo(), lambda: answers(6, 8)),
    "plackett_luce_dpo": (of_ranked.plackett_luce_dpo(), lambda: answers(6, 8)),
    "clha": (of_ranked.clha(), lambda: answers(6, 8)),
    "bradley_terry": (reward.bradley_terry(margin=True, centring=0.01), lambda: rewarded("pairs")),
    "preference_pretraining": (reward.preference_pretraining(), lambda: rewarded("pairs")),
    "binary_discrimination": (reward.binary_discrimination(), lambda: rewarded("labels")),
    "ranking": (reward.ranking(), lambda: rewarded("rankings")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_parts_of_other_data_make_the_whole_unless_coupled(name):
    """Of the losses, and of the sums and counts of every metric."""
    loss, make = OTHERS[name]
    inputs, first = make(), jnp.arange(8) < 3
    run = jax.jit(lambda valid: loss(inputs._replace(valid=valid)))
    (whole, metrics), *parts = (run(valid) for valid in (first | True, first, ~first))
    assert loss.coupled != np.allclose(whole, parts[0][0] + parts[1][0], rtol=1e-6)
    total = lambda metric: (np.sum(np.where(metric[1], metric[0], 0)), np.sum(metric[1]))  # noqa: E731
    for key in metrics if not loss.coupled else ():
        added = np.add(*(total(part[1][key]) for part in parts))
        np.testing.assert_allclose(added, total(metrics[key]), rtol=1e-5, err_msg=key)


EVERY = {**PAIRS, **COUPLED, **OF_MEANS, "cpo with nll": free.cpo(), "bco shifted": of_pairs.bco(shifted=True)}


@pytest.mark.parametrize("name", [*EVERY, *OTHERS])
def test_bfloat16_is_float32_of_rounded_inputs(pairs, name):
    """Values and gradients, and finite; of pairs the extreme ones too."""
    loss, inputs = (EVERY[name], pairs) if name in EVERY else (OTHERS[name][0], OTHERS[name][1]())
    inputs = coarse(inputs)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    wrt = ("chosen", "rejected") if hasattr(inputs, "chosen") else inputs._fields[:1]
    values, _, gradient = evaluate(loss, inputs, wrt, jit=name in OTHERS)
    expected, _, exact = evaluate(loss, rounded, wrt, jit=name in OTHERS)
    assert values.dtype == np.float32 and gradient.dtype == jnp.bfloat16
    gradient = gradient.astype(np.float32)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, exact, rtol=0.01, atol=1e-30)


def test_combine(pairs):
    """RPO: DPO and the NLL of the chosen answer."""
    loss = combine(losses=(of_pairs.dpo(), free.chosen_sft()), weights=(1.0, 0.5))
    values, metrics = call(loss, pairs)
    np.testing.assert_allclose(values, call(of_pairs.dpo(), pairs)[0] + 0.5 * pairs.chosen_nll, rtol=1e-6)
    assert {"rewards/margins", "nll_loss"} <= metrics.keys()
    assert loss.needs_reference and not free.cpo().needs_reference
    assert set(loss.needs) == {"ref_chosen", "ref_rejected", "chosen_nll"}
    assert combine(losses=(of_pairs.dpo(), of_pairs.aot()), weights=(1.0, 1.0)).coupled
    cpo = combine(losses=(free.cpo(nll_weight=0.0), free.chosen_sft()), weights=(1.0, 0.5))
    np.testing.assert_allclose(call(cpo, pairs)[0], call(free.cpo(nll_weight=0.5), pairs)[0], rtol=1e-6)


@pytest.mark.parametrize(
    "make, options, where",
    [
        (of_pairs.dpo, {"alpha": 0.5}, "alpha"),
        (of_pairs.hinge, {"divergence": "alpha"}, "alpha"),
        (of_pairs.ipo, {"divergence": "kl"}, "divergence"),
        (of_pairs.exo, {"label_smoothing": 0.0}, "label_smoothing"),
        (of_pairs.robust, {"label_smoothing": 0.5}, "label_smoothing"),
        (of_pairs.nca, {"beta": 0.0}, "beta"),
        (of_pairs.spin, {"link": "ipo"}, "link"),
        (free.alphapo, {"alpha": 0.0}, "alpha"),
        (free.cpo, {"nll_weight": -1.0}, "nll_weight"),
        (free.cpo, {"link": "sigmoid"}, "link"),
        (free.cpo, {"link": "hinge", **SMOOTHED}, "label_smoothing"),
        (of_ranked.infonca, {"temperature": 0.0}, "temperature"),
        (of_ranked.clha, {"sft_weight": -0.1}, "sft_weight"),
        (of_unpaired.kto, {"desirable_weight": -1.0}, "desirable_weight"),
        (of_unpaired.apo_zero_unpaired, {"undesirable_weight": -1.0}, "undesirable_weight"),
        (reward.bradley_terry, {"centring": -0.01}, "centring"),
        (reward.preference_pretraining, {"nll_weight": -1.0}, "nll_weight"),
        (combine, {"losses": (of_pairs.dpo(), free.chosen_sft()), "weights": (1.0, -0.1)}, "weights"),
        (combine, {"losses": (of_pairs.dpo(), free.chosen_sft()), "weights": (0.0, 0.0)}, "weights"),
        (combine, {"losses": (of_pairs.dpo(),), "weights": (1.0, 0.1)}, "weights"),
        (combine, {"losses": (), "weights": ()}, "weights"),
        (length_desensitised, {"loss": of_pairs.dpo(), "alpha": 1.5}, "alpha"),
        (length_desensitised, {"loss": free.chosen_sft(), "alpha": 0.5}, "loss: the loss reads no sums"),
        (
            length_desensitised,
            {"loss": combine(losses=(free.chosen_sft(),), weights=(1.0,)), "alpha": 0.5},
            "loss: the loss reads no sums",
        ),
        (
            length_desensitised,
            {"loss": length_desensitised(loss=of_pairs.dpo(), alpha=0.3), "alpha": 0.5},
            "loss: the loss is desensitised to length already",
        ),
    ],
)
def test_options_that_do_not_act_are_errors(make, options, where):
    with pytest.raises(LuthierError, match=f"^objective.{where}"):
        make(**options)


def test_the_ends_of_a_sweep_are_the_loss_beside_them(pairs):
    """Values that a sweep passes through, where another name gives the same: exact, and no errors."""
    ordinary = rows(pairs, slice(ORDINARY))
    plain = call(of_pairs.dpo(), ordinary)[0]
    for same in (
        of_pairs.robust(label_smoothing=0.0),
        of_pairs.dpo(divergence="alpha", alpha=1.0),
        length_desensitised(loss=of_pairs.dpo(), alpha=1.0),
        combine(losses=(of_pairs.dpo(), free.chosen_sft()), weights=(1.0, 0.0)),
    ):
        np.testing.assert_allclose(call(same, ordinary)[0], plain, rtol=1e-6)
    backward, forward = (of_pairs.dpo(divergence=name, alpha=a) for name, a in (("alpha", 0.0), ("forward_kl", None)))
    np.testing.assert_allclose(call(backward, ordinary)[0], call(forward, ordinary)[0], rtol=1e-6)


def test_losses_say_what_is_missing(pairs):
    with pytest.raises(ValueError, match="ref_chosen, ref_rejected"):
        of_pairs.dpo()(Pairs(pairs.chosen, pairs.rejected))
    with pytest.raises(ValueError, match="reads Unpaired, got Pairs"):
        call(of_unpaired.kto(), pairs)
    with pytest.raises(ValueError, match="make the sums with `tail_weights`"):
        call(length_desensitised(loss=of_pairs.dpo(), alpha=0.5), pairs)
    with pytest.raises(LuthierError, match="different kinds"):
        combine(losses=(of_pairs.dpo(), of_unpaired.kto()), weights=(1.0, 1.0))
