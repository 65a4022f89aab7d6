"""Sources → packed rows: `Batches.rows(step, start, stop)` is a pure function of its arguments.

Everything is decided by integers: which examples an epoch takes (the index map of the mixture),
which of them share a row (the pack plan), which row a step reads. So any process can make any
rows of any step, and the state of a run is the step.
"""

import collections
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2
import numpy as np
import tokenizers
from ml_collections import ConfigDict

from luthier.config import thaw
from luthier.data import cache, packing, tokenize
from luthier.data.chat import ChatTemplate
from luthier.data.demonstrations import drawn, with_demonstrations
from luthier.data.records import Format
from luthier.data.sources import Source, open_source
from luthier.errors import LuthierError, near

_LOG = logging.getLogger("luthier")
TRUNCATIONS = ("error", "drop", "keep_start", "keep_end")
_CHUNK = 512
# What `strftime_now` tells a template while data are tokenised: the same on every day.
_FIXED_TIME = datetime.datetime(2024, 7, 26)


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of the mixture, tokenised, and the stretch of each example that is used.

    Attributes:
      starts, lengths: of the examples that are kept, in the tokens of `tokens`.
      rate: share of the examples of an epoch, relative to the other parts.
      prompt: number of the soft prompt that its examples carry.
      counts: what became of the records.
    """

    name: str
    tokens: cache.TokenCache
    starts: np.ndarray
    lengths: np.ndarray
    rate: float
    prompt: int
    counts: Mapping[str, int]


class Batches:
    """Packed rows of a mixture, by step.

    An epoch takes as many examples as the parts have together, split exactly by their rates; each
    part goes through its own examples, shuffled, again and again. With one part an epoch is a pass.

    Attributes:
      counts: examples, dropped, truncated, tokens, targets and so on, over all parts; and
        `packing_efficiency`, the share of positions in a row of the first epoch that hold tokens.
      rows_per_epoch: rows of the first epoch.
      fingerprint: of everything that decides the rows.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        packing: str,
        prompt_length: int = 0,
    ):
        self.parts, self.sequence_length, self.batch_size = parts, sequence_length, batch_size
        self._tokenizer, self._seed, self._packing, self._prompt_length = tokenizer, seed, packing, prompt_length
        self._pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
        self._lengths = _joined([part.lengths for part in parts]) + np.int32(prompt_length)
        self._starts = _joined([part.starts for part in parts])
        self._bases = np.concatenate([[0], np.cumsum([len(part.lengths) for part in parts])])
        self._shares = _shares([part.rate for part in parts], int(self._bases[-1]))
        self._lock, self._first_rows, self._first_tokens = threading.RLock(), [0], [0]
        self._plans = functools.lru_cache(maxsize=2)(self._planned)
        self.rows_per_epoch = len(self._plan(0))
        counts = collections.Counter()
        for part in parts:
            counts.update(part.counts)
        filled = int(self._lengths[self._plan(0).examples].sum())
        self.counts = {**counts, "packing_efficiency": filled / (self.rows_per_epoch * sequence_length)}
        shape = [sequence_length, batch_size, seed, packing, *([prompt_length] if prompt_length else [])]
        used = [
            [p.tokens.key, p.rate, _digest(p.starts, p.lengths), *([p.prompt] * bool(prompt_length))] for p in parts
        ]
        self.fingerprint = hashlib.blake2b(json.dumps([shape, used]).encode(), digest_size=16).hexdigest()

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Rows `start` to `stop` of the batch of a step.

        Returns:
          Arrays [stop - start, sequence_length]: `tokens` and `targets` (the token after each)
          int32; `loss_weights` float32, at the position that predicts the target; `segment_ids`
          int32, 1, 2, … for the examples of a row and 0 for padding; `positions` int32, from 0 in
          each example. The last token of an example predicts nothing. With soft prompts each example
          begins with their placeholders, and `prompt_slots` int32 tells which vector belongs there, -1
          elsewhere.
        """
        stop = self.batch_size if stop is None else stop
        if not 0 <= start <= stop <= self.batch_size or step < 0:
            raise ValueError(f"rows {start}:{stop} of step {step}; a batch has {self.batch_size} rows")
        members = [self._row(step * self.batch_size + row) for row in range(start, stop)]
        examples = np.concatenate([*members, np.zeros(0, np.int64)]).astype(np.int64)
        counts = np.asarray([len(m) for m in members], np.int64)
        row = np.repeat(np.arange(stop - start), counts)
        lengths = self._lengths[examples]
        ends = np.cumsum(lengths)
        row_starts = np.concatenate([[0], ends])[np.cumsum(counts) - counts]  # tokens before each row
        within = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
        flat = np.repeat(row * self.sequence_length + ends - lengths - row_starts[row], lengths) + within
        is_slot = within < self._prompt_length
        ids, weights = np.full(len(within), self._pad, np.int32), np.zeros(len(within), np.float32)
        ids[~is_slot], weights[~is_slot] = self._gather(examples, lengths - self._prompt_length)
        last = within == np.repeat(lengths, lengths) - 1
        shape = (stop - start, self.sequence_length)
        segments = np.arange(len(examples)) - np.repeat(np.cumsum(counts) - counts, counts) + 1

        def placed(values, fill, dtype):
            array = np.full(shape[0] * shape[1], fill, dtype)
            array[flat] = values
            return array.reshape(shape)

        fields = {
            "tokens": placed(ids, self._pad, np.int32),
            "targets": placed(np.where(last, self._pad, np.roll(ids, -1)), self._pad, np.int32),
            "loss_weights": placed(np.where(last, 0.0, np.roll(weights, -1)), 0.0, np.float32),
            "segment_ids": placed(np.repeat(segments, lengths), 0, np.int32),
            "positions": placed(within, 0, np.int32),
        }
        if self._prompt_length:
            prompts = np.asarray([part.prompt for part in self.parts])[self._part_of(examples)]
            slots = np.repeat(prompts * self._prompt_length, lengths) + within
            fields["prompt_slots"] = placed(np.where(is_slot, slots, -1), -1, np.int32)
        return fields

    def epoch(self, step: int) -> float:
        """Epochs done after `step` batches."""
        epoch, rows = self._place(step * self.batch_size)
        return epoch + rows / len(self._plan(epoch))

    def tokens_before(self, step: int) -> int:
        """Tokens, padding not counted, of the batches of all steps before `step`."""
        epoch, rows = self._place(step * self.batch_size)
        whole = epoch * int(self._lengths.sum()) if len(self.parts) == 1 else self._first_tokens[epoch]
        plan = self._plan(epoch)
        return whole + int(self._lengths[plan.examples[: plan.offsets[rows]]].sum())

    def preview(self, count: int = 2) -> list[list[tuple[str, str, float]]]:
        """(token text, role, weight) of every token of the first examples, as they are trained on."""
        result = []
        for part in self.parts:
            for number in range(min(count, len(part.starts))):
                stretch = part.starts[number : number + 1], part.lengths[number : number + 1]
                texts = [self._tokenizer.decode([token]) for token in part.tokens.read("ids", *stretch)]
                roles = [tokenize.ROLES[role] for role in part.tokens.read("roles", *stretch)]
                weights = [0.0, *map(float, part.tokens.read("weights", *stretch)[1:])]
                result.append(list(zip(texts, roles, weights)))
        return result[:count]

    def _gather(self, examples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of some examples, one after the other."""
        ids, weights = np.empty(int(lengths.sum()), np.int32), np.empty(int(lengths.sum()), np.float32)
        part_of = self._part_of(examples)
        for index in np.unique(part_of):
            here = part_of == index
            mine = np.repeat(here, lengths)
            for name, values in (("ids", ids), ("weights", weights)):
                values[mine] = self.parts[index].tokens.read(name, self._starts[examples[here]], lengths[here])
        return ids, weights

    def _part_of(self, examples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._bases, examples, side="right") - 1

    def _row(self, index: int) -> np.ndarray:
        """The examples of row `index` of the whole run."""
        epoch, row = self._place(index)
        return self._plan(epoch)[row]

    def _place(self, index: int) -> tuple[int, int]:
        """(epoch, row of that epoch) of row `index` of the whole run."""
        with self._lock:
            if len(self.parts) == 1:  # every epoch packs the same lengths, so into as many rows
                return divmod(index, self.rows_per_epoch)
            while self._first_rows[-1] <= index:
                plan = self._plan(len(self._first_rows) - 1)
                self._first_tokens.append(self._first_tokens[-1] + int(self._lengths[plan.examples].sum()))
                self._first_rows.append(self._first_rows[-1] + len(plan))
            epoch = int(np.searchsorted(self._first_rows, index, side="right")) - 1
            return epoch, index - self._first_rows[epoch]

    def _plan(self, epoch: int) -> packing.Plan:
        with self._lock:  # of the threads that come to a new epoch, one makes its plan
            return self._plans(epoch)

    def _planned(self, epoch: int) -> packing.Plan:
        chosen = self._examples(epoch)
        made = packing.plan(
            self._lengths[chosen],
            seed=self._seed,
            epoch=epoch,
            sequence_length=self.sequence_length,
            packing=self._packing,
        )
        return dataclasses.replace(made, examples=chosen[made.examples])

    def _examples(self, epoch: int) -> np.ndarray:
        """The index map of the mixture: the examples that an epoch takes of each part."""
        chosen = []
        for part, (base, share) in enumerate(zip(self._bases, self._shares)):
            size = len(self.parts[part].lengths)
            first = epoch * share
            passes = range(first // size, -(-(first + share) // size))
            stream = [packing.permutation(size, self._seed, 2 + part, turn) for turn in passes]
            skipped = first - passes.start * size
            chosen.append(base + np.concatenate([*stream, np.zeros(0, np.int64)])[skipped : skipped + share])
        return np.concatenate(chosen).astype(np.int64)


def build(
    data: ConfigDict | tuple[ConfigDict, ...],
    *,
    tokenizer,
    template: ChatTemplate | str | None = None,
    sequence_length: int,
    batch_size: int,
    seed: int,
    packing: str = "best_fit",
    prompt_length: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> Batches:
    """Reads, tokenises (or finds tokenised) and plans the data of a stage.

    Args:
      data: one `luthier.config.data(...)` section, or several for a mixture by `rate`.
      tokenizer: a `Tokenizer`.
      template: chat template, or its source; default the tokenizer's own.
      sequence_length: tokens in a row.
      batch_size: rows in a batch, over all processes.
      seed: fixes order and packing.
      packing: `best_fit` or `none`.
      prompt_length: placeholders for a soft prompt in front of each example.
      cache_dir: folder of the token caches, local or `gs://`.
    """
    if template is None:
        template = tokenizer.chat_template or None
    source = template.source if isinstance(template, ChatTemplate) else template
    name = template.name if isinstance(template, ChatTemplate) else "chat template"
    fixed = ChatTemplate(source, tokenizer.special_tokens, name=name, now=_FIXED_TIME) if source else None
    sections = data if isinstance(data, (tuple, list)) else (data,)
    if prompt_length >= sequence_length:
        raise LuthierError(
            f"a soft prompt of {prompt_length} leaves no room in {sequence_length} tokens",
            where="stage.sequence_length",
            mend=f"Raise it well above {prompt_length}",
        )
    parts = tuple(
        _part(section, source, rate, tokenizer, fixed, sequence_length - prompt_length, cache_dir)
        for section in sections
        for source, rate in _opened(section, tokenizer, cache_dir)
    )
    return Batches(
        parts,
        tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        packing=packing,
        prompt_length=prompt_length,
    )


def prefetch(fn: Callable[[int], Any], start_step: int = 0, depth: int = 2) -> Iterator[tuple[int, Any]]:
    """(step, fn(step)) from `start_step` on, `depth` of them made ahead by threads, in order."""
    with ThreadPoolExecutor(max(depth, 1), thread_name_prefix="luthier-data") as pool:
        steps = itertools.count(start_step)
        ahead = collections.deque((step, pool.submit(fn, step)) for step in itertools.islice(steps, max(depth, 1)))
        try:
            while True:
                step, made = ahead.popleft()
                result = made.result()
                following = next(steps)
                ahead.append((following, pool.submit(fn, following)))
                yield step, result
        finally:
            for _, made in ahead:
                made.cancel()


def preview_table(batches: Batches, count: int = 2):
    """A `rich` table of the first examples: token, role, weight; trained tokens stand out."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("example", "token", "role", "weight", title=f"The first {count} examples as they are trained on")
    for number, example in enumerate(batches.preview(count), 1):
        for token, role, weight in example:
            style = "bold green" if weight else "dim"
            table.add_row(str(number), escape(repr(token)[1:-1]), role, f"{weight:g}", style=style)
        table.add_section()
    return table


def _opened(section: ConfigDict, tokenizer, cache_dir) -> list[tuple[Source, float]]:
    """The sources of a section with their rates; several only for a SeqIO mixture."""
    for key, known in (("truncation", TRUNCATIONS), ("train_on", tokenize.TRAIN_ON)):
        if section[key] not in known:
            raise LuthierError(f"unknown value {section[key]!r}", where=f"data.{key}", mend=near(section[key], known))
    if not section.rate > 0:
        raise LuthierError(f"rate is {section.rate}, expected a positive number", where="data.rate")
    local = None if cache_dir and "://" in os.fspath(cache_dir) else cache_dir
    if not section.source.startswith("seqio:"):
        return [(open_source(section.source, limit=section.limit, cache_dir=local), section.rate)]
    from luthier.data import seqio_tasks

    opened = []
    for task in seqio_tasks.parts(section.source, cache_dir=local):
        if remark := seqio_tasks.check_vocabulary(task, tokenizer):
            _LOG.warning("%s", remark)
        source = open_source(task.source, limit=section.limit, cache_dir=local)
        opened.append((source, section.rate * task.rate))
    return opened


def _part(
    section: ConfigDict, source: Source, rate: float, tokenizer, template, sequence_length: int, cache_dir
) -> Part:
    """Tokenises a source, or finds its tokens, and applies the truncation policy."""
    form = Format(section.format, thaw(section.columns), thaw(section.roles)).told(source[0], source.where(0))
    key = cache.key_of(
        source.fingerprint,
        json.dumps([form.name, dict(form.columns), dict(form.roles), section.train_on], sort_keys=True),
        *([f"{section.shots} shots"] if section.shots else []),
        tokenizer.fingerprint,
        json.dumps([tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size]),
        template.source + json.dumps(template.special_tokens, sort_keys=True) if template else "",
        tokenizers.__version__,
        jinja2.__version__,
    )
    produce = functools.partial(_tokenised, source, form, tokenizer, template, section.train_on, section.shots)
    tokens = cache.open_or_build(key, produce, root=cache_dir)
    return _kept(section, source, rate, tokens, sequence_length)


def _tokenised(
    source: Source, form: Format, tokenizer, template, train_on: str, shots: int
) -> Iterator[list[tokenize.Tokens]]:
    """Tokenised chunks of a source, in order; reading and rendering run ahead of the tokenizer."""

    def example(i: int):
        alone = form.read(source[i], source.where(i))
        if not shots:
            return alone
        others = [form.read(source[j], source.where(j)) for j in drawn(i, len(source), shots)]
        return with_demonstrations(alone, others, source.where(i))

    def chunk(start: int) -> list[tokenize.Tokens]:
        indices = range(start, min(start + _CHUNK, len(source)))
        examples, where = [example(i) for i in indices], [source.where(i) for i in indices]
        return tokenize.tokenize(examples, where, tokenizer=tokenizer, template=template, train_on=train_on)

    ahead = prefetch(lambda step: chunk(step * _CHUNK), depth=2)
    for _, made in itertools.islice(ahead, -(-len(source) // _CHUNK)):
        yield made
    ahead.close()


def _kept(section: ConfigDict, source: Source, rate: float, tokens: cache.TokenCache, sequence_length: int) -> Part:
    """Applies the truncation policy, and drops what it leaves without a target."""
    lengths = np.diff(tokens.offsets).astype(np.int32)
    starts, targets = tokens.offsets[:-1].copy(), tokens.targets.copy()
    over = np.flatnonzero(lengths > sequence_length)
    keep = np.ones(len(lengths), bool)
    if section.truncation == "error" and len(over):
        first = int(over[0])
        weights = tokens.read("weights", starts[first : first + 1], lengths[first : first + 1])
        raise LuthierError(
            f"the example has {lengths[first]} tokens ({int(np.argmax(weights > 0))} before the first target), the "
            f"sequence length is {sequence_length}; {len(over)} of {len(lengths)} examples are too long",
            where=source.where(first),
            mend="Raise stage.sequence_length, or set data.truncation to drop, keep_start or keep_end",
        )
    if section.truncation == "drop":
        keep[over] = False
    else:
        if section.truncation == "keep_end":
            starts[over] += lengths[over] - sequence_length
        lengths[over] = sequence_length
        for some in np.array_split(over, -(-len(over) // _CHUNK) or 1):
            # The first token of a stretch is never a target.
            weights = tokens.read("weights", starts[some] + 1, lengths[some] - 1)
            targets[some] = np.count_nonzero(weights.reshape(len(some), sequence_length - 1), axis=1)
        keep[over[targets[over] == 0]] = False
    if not keep.any():
        raise LuthierError(
            f"truncation={section.truncation!r} leaves no example with a target at sequence length {sequence_length}",
            where=section.source,
            mend="Raise stage.sequence_length",
        )
    flags = tokens.flags[keep]
    counts = {
        "examples": int(keep.sum()),
        "dropped": int((~keep).sum()),
        "truncated": int(keep[over].sum()),
        "tokens": int(lengths[keep].sum()),
        "targets": int(targets[keep].sum()),
        "boundary_warnings": int(np.count_nonzero(flags & tokenize.BOUNDARY)),
        "without_end": int(np.count_nonzero(flags & tokenize.UNTERMINATED)),
    }
    _notice(section.source, counts, sequence_length)
    return Part(section.source, tokens, starts[keep], lengths[keep], rate, section.prompt, counts)


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


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b()
    for array in arrays:
        digest.update(array)
    return digest.hexdigest()


def _shares(rates: list[float], total: int) -> list[int]:
    """`total` split in proportion to the rates, to the nearest whole example (largest remainder)."""
    ideal = np.asarray(rates, np.float64) / sum(rates) * total
    shares = np.floor(ideal).astype(int)
    shares[np.argsort(shares - ideal, kind="stable")[: total - shares.sum()]] += 1
    return [int(share) for share in shares]
