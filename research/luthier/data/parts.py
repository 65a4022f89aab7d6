"""One tokenised source of a mixture: which examples or groups of it are used, and the stretch of each."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Int32, Int64
from ml_collections import ConfigDict

from luthier.data import cache, tokenize
from luthier.data.sources import Source
from luthier.errors import LuthierError

_LOG = logging.getLogger("luthier")
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of the mixture, tokenised, and the stretch of each example that is used.

    For a preference loss the examples are the answers, those of a group one after the other.

    Attributes:
      starts, lengths: of the examples that are kept, in the tokens of `tokens`.
      rate: share of the examples (or groups) of an epoch, relative to the other parts.
      prompt: number of the soft prompt that its examples carry.
      counts: what became of the records.
      reads_labels: whether its answers are labelled, with scores 1 or 0.
      is_ranked: whether a group's answers are ranked by scores, and not chosen and rejected.
      sizes: answers of each group; None where there are no groups.
      scores: of each example; None where there are none.
    """

    name: str
    tokens: cache.TokenCache
    starts: Int64[np.ndarray, " examples"]
    lengths: Int32[np.ndarray, " examples"]
    rate: float
    prompt: int
    counts: Mapping[str, int]
    reads_labels: bool = False
    is_ranked: bool = False
    sizes: Int64[np.ndarray, " groups"] | None = None
    scores: Float32[np.ndarray, " examples"] | None = None

    def __len__(self) -> int:
        """Number of examples, or of groups where there are any."""
        return len(self.lengths if self.sizes is None else self.sizes)

    @property
    def fingerprint(self) -> str:
        """Of its tokens and of what is used of them."""
        digest = hashlib.blake2b(self.tokens.key.encode(), digest_size=16)
        for array in (self.starts, self.lengths):
            digest.update(array)
        return digest.hexdigest()

    def name_of(self, slot: int, score: float) -> str:
        """What an answer is called."""
        if self.reads_labels:
            return "mismatched" if slot else "desirable" if score else "undesirable"
        if self.is_ranked:
            return f"answer {slot + 1} (score {score:g})"
        return "rejected" if slot else "chosen"


def kept(
    section: ConfigDict,
    source: Source,
    rate: float,
    tokens: cache.TokenCache,
    form: str,
    *,
    answers: int,
    reads_labels: bool,
    sequence_length: int,
    prompt_length: int,
) -> Part:
    """Applies the truncation policy, and drops what it leaves without a target and pairs without a difference.

    Args:
      form: the name of the records' format.
      answers: most answers in a group; 0 for single examples, which are groups of one here.
      reads_labels: whether they are labelled; a pair is then two groups.
      prompt_length: placeholders of a soft prompt in front of each example.
    """
    firsts = np.flatnonzero(tokens.slots == 0)
    sizes = np.diff(firsts, append=len(tokens))
    totals = np.add.reduceat(np.diff(tokens.offsets), firsts) + sizes * prompt_length
    flags = np.bitwise_or.reduceat(tokens.flags, firsts)
    keep = flags & tokenize.IDENTICAL == 0
    identical, is_over = int((~keep).sum()), keep & (totals > sequence_length)
    if not keep.any():
        raise LuthierError(
            "chosen equals rejected in every record", where=section.source, mend="Look at how the data were made"
        )
    if section.truncation == "error" and is_over.any():
        where = source.where(int(np.argmax(is_over)) * len(source) // len(sizes))  # each record gives as many groups
        raise _too_long(where, tokens, totals, sizes, is_over, sequence_length, prompt_length, answers)
    starts, lengths = tokens.offsets[:-1].copy(), np.diff(tokens.offsets).astype(np.int32)
    targets = tokens.targets.copy()
    if section.truncation == "drop":
        keep &= ~is_over
    elif is_over.any():
        each = sequence_length // max(answers, 1) - prompt_length
        if each < 2:
            what = f"{sequence_length} tokens leave {max(each, 0)} for each of {answers} answers"
            raise LuthierError(what, where="stage.sequence_length", mend="Raise it")
        long = np.flatnonzero(np.repeat(is_over, sizes) & (lengths > each))
        if section.truncation == "keep_end":
            starts[long] += lengths[long] - each
        lengths[long] = each
        targets[long] = _targets(tokens, starts[long], each)
        keep &= np.minimum.reduceat(targets, firsts) > 0
        if answers and not reads_labels:
            cut = np.flatnonzero(keep & is_over)
            same = [_is_same(tokens, starts, lengths, firsts[i], sizes[i], form == "preference") for i in cut]
            keep[cut[np.array(same, bool)]] = False
            identical += sum(same)
            if any(same) and not keep.any():
                raise LuthierError(
                    f"truncation={section.truncation!r} leaves no difference between answers at sequence length "
                    f"{sequence_length}",
                    where=section.source,
                    mend="Raise stage.sequence_length",
                )
    if not keep.any():
        what = "group of which every answer has" if answers else "example with"
        raise LuthierError(
            f"truncation={section.truncation!r} leaves no {what} a target at sequence length "
            f"{sequence_length if answers else sequence_length - prompt_length}",
            where=section.source,
            mend="Raise stage.sequence_length",
        )
    mine = np.repeat(keep, sizes)
    counts = {
        "examples": int(keep.sum()),
        "dropped": int((~keep).sum()) - identical,
        "truncated": int((keep & is_over).sum()),
        "tokens": int(lengths[mine].sum()),
        "targets": int(targets[mine].sum()),
        "boundary_warnings": int(np.count_nonzero(flags[keep] & tokenize.BOUNDARY)),
        "without_end": int(np.count_nonzero(flags[keep] & tokenize.UNTERMINATED)),
    }
    of_groups = {}
    if answers:
        counts |= {"answers": int(mine.sum()), "identical": identical}
        if reads_labels:
            desirable = int(np.count_nonzero(tokens.scores[firsts][keep]))
            counts |= {"desirable": desirable, "undesirable": counts["examples"] - desirable}
        of_groups = {
            "reads_labels": reads_labels,
            "is_ranked": form == "ranked_preference",
            "sizes": sizes[keep],
            "scores": _scores(source, tokens, mine, firsts),
        }
    _notice(section.source, counts, sequence_length if answers else sequence_length - prompt_length)
    return Part(section.source, tokens, starts[mine], lengths[mine], rate, section.prompt, counts, **of_groups)


def check_agreement(parts: tuple[Part, ...]) -> None:
    """Raises a LuthierError where parts that give groups don't go together, or labels are all of one kind."""
    scored = {part.name: part.scores is not None for part in parts}
    if len(set(scored.values())) > 1:
        with_, without = (next(name for name, has in scored.items() if has is wanted) for wanted in (True, False))
        raise LuthierError(
            f"{with_} has scores and {without} has none",
            where="stage.data",
            mend="Give scores to all or none; data.columns={'prompt': …, 'chosen': …, 'rejected': …} leaves them out",
        )
    labels = [part.scores for part in parts if part.reads_labels]
    if labels and len(np.unique(np.concatenate(labels))) < 2:
        kind = "desirable" if labels[0][0] else "undesirable"
        raise LuthierError(
            f"every completion is labelled {kind}; KTO and the other losses of labels need both",
            where=", ".join(part.name for part in parts),
            mend="Add records with the other label",
        )


def _targets(tokens: cache.TokenCache, starts: np.ndarray, length: int) -> np.ndarray:
    """How many targets are in each stretch of one length; its first token is never one."""
    found = [np.zeros(0, np.int32)]
    for some in np.array_split(starts, -(-len(starts) // _CHUNK) or 1):
        weights = tokens.read("weights", some + 1, np.full(len(some), length - 1))
        found.append(np.count_nonzero(weights.reshape(len(some), length - 1), axis=1))
    return np.concatenate(found)


def _is_same(tokens: cache.TokenCache, starts, lengths, first: int, size: int, is_contrast: bool) -> bool:
    """Whether the stretches of a group's answers are one, or in a contrast the first is that of another."""
    mine = slice(first, first + size)
    ids = np.split(tokens.read("ids", starts[mine], lengths[mine]), np.cumsum(lengths[mine])[:-1])
    return (any if is_contrast else all)(np.array_equal(ids[0], other) for other in ids[1:])


def _too_long(
    where: str, tokens, totals, sizes, is_over, sequence_length: int, prompt_length: int, answers: int
) -> LuthierError:
    first, count = int(np.argmax(is_over)), int(is_over.sum())
    mend = "Raise stage.sequence_length, or set data.truncation to drop, keep_start or keep_end"
    if answers:
        several = f"{sizes[first]} answers with their prompts have"
        soft = f", {prompt_length} of a soft prompt each included" if prompt_length else ""
        return LuthierError(
            f"the {several if sizes[first] > 1 else 'answer with its prompt has'} {totals[first]} tokens{soft}, the "
            f"sequence length is {sequence_length}; {count} of {len(totals)} groups are too long",
            where=where,
            mend=mend,
        )
    length = totals[first : first + 1] - prompt_length
    weights = tokens.read("weights", tokens.offsets[first : first + 1], length)
    return LuthierError(
        f"the example has {length[0]} tokens ({int(np.argmax(weights > 0))} before the first target), the "
        f"sequence length is {sequence_length - prompt_length}; {count} of {len(totals)} examples are too long",
        where=where,
        mend=mend,
    )


def _scores(source: Source, tokens: cache.TokenCache, mine: np.ndarray, firsts: np.ndarray) -> np.ndarray | None:
    missing = np.isnan(tokens.scores)
    if missing.all():
        return None
    if missing.any():
        record = int(np.searchsorted(firsts, np.argmax(missing), side="right")) - 1
        raise LuthierError(
            "the record has no scores and others of the file have some",
            where=source.where(record),
            mend="Give scores to all or none; data.columns={'prompt': …, 'chosen': …, 'rejected': …} leaves them out",
        )
    return tokens.scores[mine]


def _notice(source: str, counts: Mapping[str, int], sequence_length: int) -> None:
    """Says what a user would want to know of before training."""
    remarks = {
        "truncated": f"were cut to {sequence_length} tokens",
        "boundary_warnings": "have a prompt whose tokens change once the completion follows; the completion is trained "
        "from where they part (end prompts before a space, not after it)",
        "without_end": "have no end-of-text token among their targets; the model does not learn to stop from them",
    }
    for name, remark in remarks.items():
        if counts[name]:
            _LOG.warning("%s: %d of %d examples %s", source, counts[name], counts["examples"], remark)
    if counts["dropped"]:
        _LOG.warning("%s: %d examples dropped: longer than %d tokens", source, counts["dropped"], sequence_length)
    if counts.get("identical"):
        _LOG.warning("%s: %d groups skipped: chosen equals rejected", source, counts["identical"])
