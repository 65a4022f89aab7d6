"""What the studies teach the laboratory model, and what they watch it keep.

`write(folder)` makes FOLDER/LABEL/{test,dev,train}.jsonl; `evaluations` gives the specs of a recipe.
"""

import dataclasses
import json
import pathlib
import types
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from laboratory.episodes import SEPARATOR, chance, records
from laboratory.formats import HELD_OUT, LAYOUTS, Format
from luthier import config as c

TRAIN, DEV, TEST = 2000, 300, 300  # records; learning rates are chosen on dev
SEED = 0


@dataclasses.dataclass(frozen=True)
class Entry:
    """A family of tasks in one format, its classes called by `labels`, asked after `shots` solved examples."""

    family: str
    form: Format
    labels: tuple[str, ...] = ()
    shots: int = 4


_TOLD = Format(LAYOUTS[1], ("input", "output"), ":", names_task=True)
# What is taught, without demonstrations and in one format. No episode of pretraining had the first three.
TARGETS: Mapping[str, Entry] = {
    # Two answers, as RTE for ProMoT: a format to specialise in.
    "ordered": Entry("ordered", Format(LAYOUTS[0], ("text", "answer"), ":"), ("true", "false"), 0),
    # As En-Fr: new words, read off known ones.
    "translate": Entry("plain_to_muhor", Format(LAYOUTS[1], ("source", "target"), "->"), (), 0),
    # Whose answers the start does not think of.
    "sum": Entry("sum_of_three", Format(LAYOUTS[5], ("given", "result"), "=", between_items="+"), (), 0),
    # An instruction that the start follows badly: it answers a fifth of them.
    "odd": Entry("outlier", _TOLD, (), 0),
}
# What a lesson could carry over to: another format, and inputs beyond those it had.
BEYOND: Mapping[str, Entry] = {
    "sum-reworded": Entry("sum_of_three", Format(LAYOUTS[1], ("question", "answer"), "->", between_items="+"), (), 0),
    "sum-large": Entry("sum_of_large", TARGETS["sum"].form, (), 0),
    "odd-reworded": Entry("outlier", Format(LAYOUTS[3], ("", ""), "=", names_task=True), (), 0),
    "odd-of-five": Entry("outlier_of_five", _TOLD, (), 0),
}
# Few-shot tasks in many formats, known and held-out ones; none names its task. Only what the start can do is asked:
# after four examples it was within 20 points of chance on reverse, rotate, last, compare, same_kind and member. The
# largest, the outlier and what is looked up it names no better than who names anything listed: they enter no mean.
FEW_SHOT: Mapping[str, Entry] = {
    "sort": Entry("sort_numbers", Format(LAYOUTS[0], ("question", "answer"), ":", between_items=",")),
    "largest": Entry("largest", HELD_OUT["both-sides"]),
    "successor": Entry("next_letter", HELD_OUT["tilde"]),
    "plus": Entry("plus", Format(LAYOUTS[5], ("x", "y"), "is", between_groups="with")),
    "outlier": Entry("outlier", HELD_OUT["signal-echo"]),
    "lookup": Entry("lookup", Format(LAYOUTS[2], ("query", "reply"), ":")),
    "to-bakan": Entry("plain_to_bakan", HELD_OUT["marked"]),
}
# Zero-shot tasks that the format names, as instructions do.
NAMED: Mapping[str, Entry] = {
    "told-count": Entry("count", Format(LAYOUTS[3], ("", ""), "is", names_task=True), shots=0),
    "told-rotate": Entry("rotate", Format(LAYOUTS[1], ("x", "y"), "=>", names_task=True), shots=0),
    "told-reverse": Entry("reverse", Format(LAYOUTS[3], ("", ""), "=", names_task=True), shots=0),
    "told-plus": Entry("plus", Format(LAYOUTS[1], ("input", "output"), ":", names_task=True), shots=0),
    "told-translate": Entry("plain_to_zelin", Format(LAYOUTS[0], ("text", "result"), ":", names_task=True), shots=0),
}
RETAINED = {**FEW_SHOT, **NAMED}
ALL = {**TARGETS, **BEYOND, **RETAINED}


def write(folder: pathlib.Path) -> None:
    """Records of every entry, `dev` those of targets; no problem is in two parts; a small task has fewer in `train`."""
    for label, entry in ALL.items():
        dev = DEV if label in TARGETS else 0
        found = records(entry.family, entry.form, TEST + dev + TRAIN, SEED, entry.labels)
        parts = {"test": found[:TEST], "dev": found[TEST:][:dev], "train": found[TEST + dev :]}
        (folder / label).mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            (folder / label / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))


def evaluations(
    folder: str | pathlib.Path,
    labels: Iterable[str],
    *,
    part: str = "test",
    limit: int = TEST,
    prompts: Mapping[str, int] = types.MappingProxyType({}),
    apart: tuple[str, ...] = (),
) -> tuple[ConfigDict, ...]:
    """Specs that ask for the entries; those of RETAINED count for the retention table.

    Args:
      part: `test`, or `dev` to choose a learning rate.
      prompts: of targets the number of their soft prompt, where it is not 0.
      apart: collections of tuners that stay with the targets and are left out elsewhere, such as ProMoT's `prompt`.
    """
    return tuple(
        c.spec(
            "verifier",
            label=label,
            data=f"{folder}/{label}/{part}.jsonl",
            verifier="exact",
            shots=ALL[label].shots,
            shots_from=f"{folder}/{label}/train.jsonl" if ALL[label].shots else None,
            limit=limit,
            stop=(SEPARATOR,),  # in pretraining mostly another example follows
            max_new_tokens=12,
            batch_size=64,
            retention=label in RETAINED,
            chance=chance(ALL[label].family, TEST, SEED, ALL[label].labels),
            soft_prompt=prompts.get(label, 0),
            without=() if label in TARGETS else apart,
        )
        for label in labels
    )
