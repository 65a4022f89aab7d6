"""Preference records → groups in packed rows: read back from rows they are the records; bad ones are refused."""

import itertools
import json
import pathlib
import re

import chat_cases
import numpy as np
import pytest

from luthier import config
from luthier.data import batches
from luthier.data.records import PREFERENCES, detect
from luthier.errors import LuthierError

U, A = chat_cases.user, chat_cases.assistant
GOLDENS = pathlib.Path(__file__).parent / "goldens" / "preference_data.json"
PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I think."}
LABELLED = [
    {"prompt": "The sky is", "completion": " blue.", "label": True},
    {"prompt": "The sea is", "completion": " dry and small.", "label": False},
    {"prompt": "2 + 3 is", "completion": " 5", "label": True},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def file_of(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def built(data, *, answers=2, most=2, mismatched=False, sequence_length=128, batch_size=2, prompt_length=0, **options):
    """Batches of a file, or of sections, with SmolLM2's template."""
    return batches.build(
        data if isinstance(data, tuple) else config.data(data, answers=most, **options),
        tokenizer=chat_cases.tokenizer("smollm2"),
        template=chat_cases.template("smollm2"),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=0,
        prompt_length=prompt_length,
        answers=answers,
        mismatched=mismatched,
    )


def of(tmp_path, *records, **options):
    return built(file_of(tmp_path / "a.jsonl", records), **options)


def epoch_of(made):
    rows = [
        made.rows(row // made.batch_size, row % made.batch_size, row % made.batch_size + 1)
        for row in range(made.rows_per_epoch)
    ]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def answers_of(rows, most, slots=0):
    """Every group of some rows as {k: what its answer is}, read token by token."""
    tokenizer, found = chat_cases.tokenizer("smollm2"), []
    for row in range(len(rows["tokens"])):
        line, groups = {name: values[row].tolist() for name, values in rows.items()}, {}
        for segment, run in itertools.groupby(enumerate(line["segment_ids"]), lambda pair: pair[1]):
            places = [place for place, _ in run]
            if segment == 0:
                assert not any(line["loss_weights"][t] for t in places)
                continue
            assert [line["positions"][t] for t in places] == list(range(len(places)))
            assert line["loss_weights"][places[-1]] == 0
            own = places[slots:]
            learnt = [t + 1 for t in places if line["loss_weights"][t]]
            assert all(line["targets"][t - 1] == line["tokens"][t] for t in learnt)
            prompt = tokenizer.decode([line["tokens"][t] for t in own if t < learnt[0]])
            trained = tokenizer.decode([line["tokens"][t] for t in learnt])
            scores = {line["scores"][t] for t in places} if "scores" in line else {None}
            assert len(scores) == 1
            group, slot = divmod(segment - 1, most)
            assert slot not in groups.setdefault(group, {})
            groups[group][slot] = (prompt, trained, scores.pop())
        assert sorted(groups) == list(range(len(groups)))
        found += [groups[group] for group in sorted(groups)]
    return found


END = "<|im_end|>"
HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def asked(text, head=HEAD):
    return f"{head}<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n"


BLUE = [(asked("Sky?"), "blue" + END), (asked("Sky?"), "green" + END)]
# Name → record, answers, what it says: (prompt, answer[, score]) of each.
GROUPS = {
    "explicit text": (PAIR, 2, [("The sky is", " blue." + END), ("The sky is", " green, I think." + END)]),
    "implicit text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green, I think."},
        2,
        [("The sky is", " blue." + END), ("The sky is", " green, I think." + END)],
    ),
    "implicit text, one within the other": (
        {"chosen": "x25", "rejected": "x25x"},
        2,
        [("x2", "5" + END), ("x2", "5x" + END)],
    ),
    "explicit messages": (
        {"prompt": [U("Sky?")], "chosen": [A("blue")], "rejected": [A("green")]},
        2,
        BLUE,
    ),
    "implicit messages": ({"chosen": [U("Sky?"), A("blue")], "rejected": [U("Sky?"), A("green")]}, 2, BLUE),
    "UltraFeedback, binarised": (
        {
            "prompt": "Sky?",
            "prompt_id": "ab",
            "messages": [U("Sky?"), A("blue")],
            "chosen": [U("Sky?"), A("blue")],
            "rejected": [U("Sky?"), A("green")],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        2,
        [(*BLUE[0], 8.5), (*BLUE[1], 3.0)],
    ),
    "prompt text, answers messages": ({"prompt": "Sky?", "chosen": [A("blue")], "rejected": [A("green")]}, 2, BLUE),
    "prompt messages, answers text": ({"prompt": [U("Sky?")], "chosen": "blue", "rejected": "green"}, 2, BLUE),
    "prompt messages, repeated": (
        {"prompt": [U("Sky?")], "chosen": [U("Sky?"), A("blue")], "rejected": [U("Sky?"), A("green")]},
        2,
        BLUE,
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "blue"},
            "rejected": {"from": "gpt", "value": "green"},
        },
        2,
        BLUE,
    ),
    "Alpaca": ({"instruction": "Sky?", "input": "", "chosen": "blue", "rejected": "green"}, 2, BLUE),
    "SPIN": ({"real": [U("Sky?"), A("blue")], "generated": [U("Sky?"), A("green")]}, 2, BLUE),
    "several rejected": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": [" wide.", " 5."]},
        3,
        [("The sky is", " blue." + END, 1.0), ("The sky is", " wide." + END, 0.0), ("The sky is", " 5." + END, 0.0)],
    ),
    "ranked": (
        {"prompt": "The sky is", "completions": [" 5.", " blue.", " wide."], "scores": [-1, 4.5, 2]},
        4,
        [("The sky is", " blue." + END, 4.5), ("The sky is", " wide." + END, 2.0), ("The sky is", " 5." + END, -1.0)],
    ),
    "ranked messages": (
        {"prompt": [U("Sky?")], "completions": [[A("blue")], [A("green")]], "scores": [1.0, 0.5]},
        4,
        [(*BLUE[0], 1.0), (*BLUE[1], 0.5)],
    ),
    "UltraFeedback, raw": (
        {
            "instruction": "Sky?",
            "models": ["a", "b"],
            "completions": [
                {"response": "green", "overall_score": 2.0, "model": "a"},
                {"response": "blue", "overall_score": 7.5, "model": "b"},
            ],
        },
        2,
        [(*BLUE[0], 7.5), (*BLUE[1], 2.0)],
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_record_is_read_back_from_its_row(tmp_path, name):
    record, most, expected = GROUPS[name]
    made = of(tmp_path, record, answers=most, most=most)
    (group,) = answers_of(made.rows(0, 0, 1), made.answers)
    assert [group[k] for k in sorted(group)] == [(*one, None)[:3] for one in expected]
    assert made.has_scores == (len(expected[0]) == 3) and made.answers == most
    assert sorted(group) == list(range(len(expected)))


WORDS = "the sky is blue and sea wide deep answer question how many".split()


def pairs(count, seed=0, **extra):
    """Records of pairs whose texts are all different."""
    random = np.random.RandomState(seed)

    def words(most):
        return " ".join(WORDS[i] for i in random.randint(0, len(WORDS), random.randint(1, most)))

    return [
        {"prompt": f"{seed}.{i}: {words(9)}", "chosen": f" {words(12)}", "rejected": f" not {words(12)}", **extra}
        for i in range(count)
    ]


def sides_of(record):
    return {0: (record["prompt"], record["chosen"] + END, None), 1: (record["prompt"], record["rejected"] + END, None)}


def in_order(groups):
    return sorted(groups, key=lambda group: (group[0], sorted(group.items())))


@pytest.mark.parametrize("packing_rows", [1, 3])
def test_an_epoch_holds_every_group_once(tmp_path, packing_rows):
    records = pairs(83)
    made = of(tmp_path, *records, batch_size=packing_rows)
    assert in_order(answers_of(epoch_of(made), 2)) == in_order(map(sides_of, records))
    assert made.counts["examples"] == 83 and made.counts["answers"] == 166 and made.counts["packing_efficiency"] > 0.8
    again = of(tmp_path, *records, batch_size=packing_rows)
    halves = [again.rows(17, 0, 1), again.rows(17, 1, packing_rows)]
    for name, values in made.rows(17).items():
        np.testing.assert_array_equal(values, np.concatenate([half[name] for half in halves]))
    assert made.tokens_before(9) == sum(np.count_nonzero(made.rows(step)["segment_ids"]) for step in range(9))
    assert len({made.fingerprint, again.fingerprint, of(tmp_path, *records, batch_size=4).fingerprint}) == 2


def test_a_mixture_of_groups_has_its_rates(tmp_path):
    files = [file_of(tmp_path / f"{n}.jsonl", pairs(size, seed=n)) for n, size in enumerate((30, 10))]
    made = built(tuple(config.data(file, rate=rate, limit=9) for file, rate in zip(files, (2.0, 1.0))))
    epoch = answers_of(epoch_of(made), 2)
    assert [sum(group[0][0].startswith(f"{n}.") for group in epoch) for n in (0, 1)] == [12, 6]
    known = [sides_of(record) for n in (0, 1) for record in pairs(9, seed=n)] + []
    assert all(any(group[0][0] == one[0][0] for one in known) for group in epoch)
    assert made.counts["examples"] == 18


def test_a_ranked_record_may_have_fewer_answers(tmp_path):
    records = [
        {"prompt": "The sky is", "completions": [f" {n}." for n in range(size)], "scores": [-n for n in range(size)]}
        for size in (2, 4, 3)
    ]
    groups = answers_of(epoch_of(of(tmp_path, *records, answers=4, most=4, batch_size=1)), 4)
    expected = [{n: ("The sky is", f" {n}." + END, -n) for n in range(size)} for size in (2, 3, 4)]
    assert sorted(groups, key=len) == expected


@pytest.mark.parametrize("mismatched", [False, True])
def test_labelled_answers_and_the_mismatched_ones(tmp_path, mismatched):
    """The same prompt with the answer of the record before; before the first comes the last."""
    made = of(tmp_path, *LABELLED, answers=1, mismatched=mismatched, batch_size=1)
    expected = []
    for record, before in zip(LABELLED, [LABELLED[-1], *LABELLED]):
        own, other = ((record["prompt"], one["completion"] + END, float(record["label"])) for one in (record, before))
        expected.append({0: own, 1: other} if mismatched else {0: own})
    assert in_order(answers_of(epoch_of(made), made.answers)) == in_order(expected)
    assert made.has_scores and made.answers == 1 + mismatched
    assert (made.counts["desirable"], made.counts["undesirable"]) == (2, 1)


@pytest.mark.parametrize("mismatched", [False, True])
def test_a_pair_is_two_labelled_answers(tmp_path, mismatched):
    """What TRL calls unpairing; the mismatched answer is that of the same side of the record before."""
    records = pairs(9)
    records[4]["rejected"] = records[4]["chosen"]
    made = of(tmp_path, *records, answers=1, mismatched=mismatched)
    expected = []
    for number, record in enumerate(records):
        for label, side in enumerate(("rejected", "chosen")):
            own = (record["prompt"], record[side] + END, float(label))
            other = (record["prompt"], records[number - 1][side] + END, float(label))
            if number != 4:
                expected.append({0: own, 1: other} if mismatched else {0: own})
    assert in_order(answers_of(epoch_of(made), made.answers)) == in_order(expected)
    assert [made.counts[name] for name in ("examples", "desirable", "identical")] == [16, 8, 2]
    with pytest.raises(LuthierError, match=r"a\.jsonl:4: the answer with its prompt has \d+ tokens, .* 1 of 10 groups"):
        of(tmp_path, *records[:3], {**records[3], "rejected": " blue" * 400}, records[5], answers=1)


def test_a_mismatched_answer_may_be_the_same_words(tmp_path):
    records = [{**LABELLED[0], "label": label} for label in (True, False, True)]
    made = of(tmp_path, *records, mismatched=True)
    assert made.counts["examples"] == 3 and made.counts["identical"] == 0


def test_chats_are_mismatched_too(tmp_path):
    records = [
        {"prompt": [U(q)], "completion": [A(a)], "label": a == "5"} for q, a in (("2 + 3?", "5"), ("Sky?", "red"))
    ]
    groups = answers_of(epoch_of(of(tmp_path, *records, answers=2, mismatched=True)), 2)
    for group, (question, own, other) in zip(in_order(groups), [("2 + 3?", "5", "red"), ("Sky?", "red", "5")]):
        score = float(own == "5")
        assert group == {0: (asked(question), own + END, score), 1: (asked(question), other + END, score)}


# A preference that its context turns round. Where the context stands → (what a record has, what is read of it).
TURNED = [("Be brief.", "blue", "It is blue."), ("Be polite.", "It is blue.", "blue")]
SPOKEN_TO = lambda context: asked("Sky?", f"<|im_start|>system\n{context}{END}\n")  # noqa: E731
CONTEXTS = {
    "a system message": (lambda context: {"prompt": [{"role": "system", "content": context}, U("Sky?")]}, SPOKEN_TO),
    "Alpaca's system": (lambda context: {"instruction": "Sky?", "system": context}, SPOKEN_TO),
    "ShareGPT's system": (
        lambda context: {"conversations": [{"from": "human", "value": "Sky?"}], "system": context},
        SPOKEN_TO,
    ),
    "the user's words": (
        lambda context: {"prompt": [U(f"{context} Sky?")]},
        lambda context: asked(f"{context} Sky?"),
    ),
    "text": (lambda context: {"prompt": f"{context} Sky?\n"}, lambda context: f"{context} Sky?\n"),
}


@pytest.mark.parametrize("place", CONTEXTS)
def test_a_context_is_read_before_each_answer_and_not_trained(tmp_path, place):
    """In training and by a cached reference; of labelled answers before the mismatched one too."""
    given, read = CONTEXTS[place]
    records = [{**given(context), "chosen": good, "rejected": bad} for context, good, bad in TURNED]
    pairs, labelled = [], []
    for (context, *own), (_, *other) in zip(TURNED, TURNED[::-1]):
        pairs.append({k: (read(context), answer + END, None) for k, answer in enumerate(own)})
        for answers, label in zip(zip(own, other), (1.0, 0.0)):
            labelled.append({k: (read(context), answer + END, label) for k, answer in enumerate(answers)})
    for expected, options in ((pairs, {}), (labelled, {"answers": 1, "mismatched": True})):
        made = of(tmp_path, *records, **options)
        trained, compared = epoch_of(made), [rows for _, rows, _ in made.stretches()]
        assert in_order(answers_of(trained, 2)) == in_order(expected)
        assert in_order(group for rows in compared for group in answers_of(rows, 2)) == in_order(expected)


def test_a_context_beside_messages_is_read_as_sft_reads_it(tmp_path):
    """`system` goes first, unless the messages have one of their own."""
    told, turns = {"role": "system", "content": "Own."}, [U("Sky?"), A("blue")]
    sides = {"chosen": [A("blue")], "rejected": [A("red")]}
    for system, record in {
        "Be brief.": {"messages": turns, "kto_tag": True},
        "Own.": {"messages": [told, *turns], "kto_tag": True},
    }.items():
        record = {**record, "system": "Be brief."}
        made = answers_of(epoch_of(of(tmp_path, record, {**record, "kto_tag": False}, answers=1)), 1)
        assert in_order(made) == in_order({0: (SPOKEN_TO(system), "blue" + END, label)} for label in (0.0, 1.0))
    for system, record in {
        "Be brief.": {"prompt": [U("Sky?")], **sides},
        "Own.": {"conversations": [{"from": "system", "value": "Own."}, {"from": "human", "value": "Sky?"}], **sides},
    }.items():
        (made,) = answers_of(epoch_of(of(tmp_path, {**record, "system": "Be brief."})), 2)
        assert made == {0: (SPOKEN_TO(system), "blue" + END, None), 1: (SPOKEN_TO(system), "red" + END, None)}


def test_an_empty_context_is_none(tmp_path):
    """`null` and "" are what tables write where there is nothing; another kind of value is an error."""
    plain = {"prompt": "Sky?", "chosen": " blue", "rejected": " red"}
    chat = {"prompt": [U("Sky?")], "chosen": [A("blue")], "rejected": [A("red")]}
    spin = {"real": [U("Sky?"), A("blue")], "generated": [U("Sky?"), A("red")]}
    for record in (plain, chat, spin):
        without = answers_of(epoch_of(of(tmp_path, record)), 2)
        for nothing in (None, ""):
            assert answers_of(epoch_of(of(tmp_path, {**record, "system": nothing})), 2) == without
    with pytest.raises(LuthierError, match="system.*is a number"):
        of(tmp_path, {**chat, "system": 5})


def test_a_context_beside_plain_text_is_an_error(tmp_path):
    for record in ({"chosen": " blue", "rejected": " red"}, {"completion": " blue", "label": True}):
        with pytest.raises(LuthierError, match="'system' stands beside a prompt of plain text"):
            of(tmp_path, {"prompt": "Sky?", "system": "Be brief.", **record}, answers=3 - len(record))


UNPAIRED = {
    "Alpaca": {"instruction": "Sky?", "input": "", "output": "blue", "kto_tag": True},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "blue"}],
        "kto_tag": True,
    },
    "messages": {"messages": [U("Sky?"), A("blue")], "kto_tag": True},
    "prompt and completion": {"prompt": [U("Sky?")], "completion": "blue", "label": True},
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_labelled_records_of_other_shapes(tmp_path, name):
    record = UNPAIRED[name]
    opposite = {**record, "kto_tag" if "kto_tag" in record else "label": False}
    groups = answers_of(epoch_of(of(tmp_path, record, opposite, answers=1)), 1)
    assert in_order(groups) == [{0: (*BLUE[0], 0.0)}, {0: (*BLUE[0], 1.0)}]


SEVERAL = {
    "prompt": [U("Hi"), A("Hello."), U("Sky?")],
    "chosen": [A("blue"), U("Sure?"), A("Yes.")],
    "rejected": [A("green"), {"role": "tool", "content": "5"}, A("wide"), U("So?"), A("No.")],
}


@pytest.mark.parametrize("family", ["smollm2", "marked"])
@pytest.mark.parametrize("is_implicit", [False, True])
def test_of_several_turns_only_what_the_model_wrote_after_the_prompt_is_trained(tmp_path, family, is_implicit):
    """Read from the tokens: neither template nor user nor tool, nor the assistant's turn inside the prompt."""
    prompt = SEVERAL["prompt"]
    record = {side: prompt + SEVERAL[side] for side in ("chosen", "rejected")} if is_implicit else SEVERAL
    tokenizer = chat_cases.tokenizer(family)
    made = batches.build(
        config.data(file_of(tmp_path / "a.jsonl", [record]), train_on="assistant"),
        tokenizer=tokenizer,
        template=chat_cases.template(family),
        sequence_length=256,
        batch_size=1,
        seed=0,
        answers=2,
    )
    rows = {name: values[0] for name, values in made.rows(0).items()}
    for slot, expected in enumerate((["blue", "Yes."], ["green", "wide", "No."])):
        mine = (rows["segment_ids"] == slot + 1) & (rows["loss_weights"] > 0)
        runs = np.split(rows["targets"][mine], np.flatnonzero(np.diff(np.flatnonzero(mine)) > 1) + 1)
        assert [tokenizer.decode(run).strip() for run in runs] == [word + END for word in expected]


@pytest.mark.parametrize("role", ["user", "tool"])
def test_several_turns_of_which_not_all_are_the_models_are_no_completion(tmp_path, role):
    record = {**SEVERAL, "rejected": [A("green"), {"role": role, "content": "5"}, A("wide")], "chosen": [A("blue")]}
    with pytest.raises(LuthierError, match=rf"a\.jsonl:1: after its prompt the answer has a {role} message\. Set data"):
        of(tmp_path, record)
    made = of(tmp_path, {**record, "rejected": [A("green"), A("wide")]})
    assert answers_of(made.rows(0, 0, 1), 2)[0][1][1].count(END) == 2


CALLED = {"role": "tool", "content": "5"}
SPOKEN = [
    {"messages": [U("Hi"), A("Hello."), U("Sky?"), CALLED, A("blue")], "kto_tag": True},
    {"messages": [A("Good day."), U("Sea?"), A("wet"), U("Sure?"), A("Yes.")], "kto_tag": False},
]


def test_of_a_labelled_conversation_the_last_turn_or_every_turn_of_the_models_is_trained(tmp_path):
    """With `assistant` from the first that answers something on; the mismatched answer is cut at the same place."""

    def trained(**options):
        made = of(tmp_path, *SPOKEN, mismatched=True, batch_size=1, sequence_length=256, **options)
        tokenizer, found = chat_cases.tokenizer("smollm2"), {}
        for step in range(made.rows_per_epoch):
            rows = {name: values[0] for name, values in made.rows(step).items()}
            for segment in range(1, rows["segment_ids"].max() + 1):
                mine = rows["segment_ids"] == segment
                learnt = np.flatnonzero(mine & (rows["loss_weights"] > 0))
                runs = np.split(rows["targets"][learnt], np.flatnonzero(np.diff(learnt) > 1) + 1)
                said = [tokenizer.decode(run).removesuffix(END).strip() for run in runs]
                found[rows["scores"][mine].max(), (segment - 1) % 2] = said, tokenizer.decode(rows["tokens"][mine])
        return found

    last = trained()
    assert {key: said for key, (said, _) in last.items()} == {
        (1, 0): ["blue"],
        (1, 1): ["Yes."],
        (0, 0): ["Yes."],
        (0, 1): ["blue"],
    }
    assert all(word in last[1, 1][1] for word in ("Hi", "Hello.", "Sky?", "Yes.")) and "Sea?" not in last[1, 1][1]
    every = trained(train_on="assistant")
    assert {key: said for key, (said, _) in every.items()} == {
        (1, 0): ["Hello.", "blue"],
        (1, 1): ["wet", "Yes."],
        (0, 0): ["wet", "Yes."],
        (0, 1): ["Hello.", "blue"],
    }
    assert "Hi" in every[1, 1][1] and "Sea?" not in every[1, 1][1] and "Good day." in every[0, 1][1]


def test_with_one_turn_assistant_is_completion(tmp_path):
    record, one = {"chosen": [U("Hi"), A("Hello."), U("Sky?"), A("blue")]}, {"train_on": "assistant"}
    record["rejected"] = [*record["chosen"][:-1], A("green")]
    first, second = (of(tmp_path, record, **options).rows(0) for options in ({}, one))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def tokens_of(text, completion):
    """The tokens of an answer after its prompt, and how many are the prompt's."""
    tokenizer = chat_cases.tokenizer("smollm2")
    return [*tokenizer.encode(text + completion), tokenizer.eos_id], len(tokenizer.encode(text))


def test_a_soft_prompt_goes_before_each_answer(tmp_path):
    records, slots = pairs(11), 3
    made = of(tmp_path, *records, prompt_length=slots)
    epoch = epoch_of(made)
    assert in_order(answers_of(epoch, 2, slots)) == in_order(map(sides_of, records))
    for row, segments in enumerate(epoch["segment_ids"]):
        for segment in set(segments.tolist()) - {0}:
            mine = epoch["prompt_slots"][row][segments == segment]
            assert mine[:slots].tolist() == [0, 1, 2] and set(mine[slots:].tolist()) == {-1}


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end"])
def test_truncation_is_of_groups(tmp_path, truncation):
    """Where both answers together are too long each is cut to its half; a group that loses an answer is dropped."""
    records, length, slots = pairs(40), 48, 2
    records[3]["prompt"] = "question " * 40
    records[5] |= {"chosen": " blue", "rejected": " the sky" * 40}
    made = of(tmp_path, *records, truncation=truncation, sequence_length=length, prompt_length=slots)
    tokenizer, expected, over = chat_cases.tokenizer("smollm2"), [], 0
    for record in records:
        sides = [tokens_of(record["prompt"], record[side]) for side in ("chosen", "rejected")]
        is_over = sum(len(ids) + slots for ids, _ in sides) > length
        over += is_over
        group = {}
        for slot, (ids, prompt) in enumerate(sides):
            start, stop = 0, len(ids)
            if is_over and len(ids) > length // 2 - slots:
                stop = length // 2 - slots if truncation == "keep_start" else len(ids)
                start = len(ids) - (length // 2 - slots) if truncation == "keep_end" else 0
            if stop > prompt:
                # the last vector of a soft prompt predicts the first token that is left
                learnt = max(prompt, start)
                group[slot] = (tokenizer.decode(ids[start:learnt]), tokenizer.decode(ids[learnt:stop]), None)
        if len(group) == 2 and not (is_over and truncation == "drop"):
            expected.append(group)
    assert 5 < over < 35
    assert in_order(answers_of(epoch_of(made), 2, slots)) == in_order(expected)
    assert made.counts["dropped"] == 40 - len(expected) == {"drop": over, "keep_start": 1, "keep_end": 0}[truncation]
    assert made.counts["truncated"] == {"drop": 0, "keep_start": over - 1, "keep_end": over}[truncation]


def test_equal_answers_are_skipped_and_counted(tmp_path, caplog):
    records = pairs(6)
    records[2]["rejected"] = records[2]["chosen"]
    records[4] = {"chosen": [U("Hi"), A("blue")], "rejected": [U("Hi"), A("blue")]}
    made = of(tmp_path, *records)
    assert (made.counts["identical"], made.counts["examples"], made.counts["dropped"]) == (2, 4, 0)
    assert "a.jsonl: 2 groups skipped: chosen equals rejected" in caplog.text
    assert in_order(answers_of(epoch_of(made), 2)) == in_order(sides_of(records[i]) for i in (0, 1, 3, 5))
    same = {"chosen": "The sky", "rejected": "The sky"}
    with pytest.raises(LuthierError, match=r"a\.jsonl: chosen equals rejected in every record"):
        of(tmp_path, same, same)


def test_an_answer_equal_to_one_of_several_rejected_is_skipped(tmp_path):
    records = [{"prompt": "The sky is", "chosen": " blue.", "rejected": [f" {n}.", " wide."]} for n in range(3)]
    records[1]["rejected"][1] = " blue."
    made = of(tmp_path, *records, answers=3, most=3)
    assert (made.counts["identical"], made.counts["examples"], made.counts["dropped"]) == (1, 2, 0)
    ranked = [{**K3, "completions": [" a", " a", " b"], "scores": [2, 1, 0]}] * 2
    assert of(tmp_path, *ranked, answers=3, most=3).counts["identical"] == 0  # ranked, and the third differs


def test_answers_that_truncation_makes_equal_are_skipped(tmp_path):
    records, long = pairs(5), " the sky" * 60
    records[2] |= {"chosen": f" blue{long} and", "rejected": f" blue{long} so"}
    made = of(tmp_path, *records, truncation="keep_start", sequence_length=96)
    assert (made.counts["identical"], made.counts["examples"], made.counts["dropped"]) == (1, 4, 0)
    assert made.counts["truncated"] == 0
    made = of(tmp_path, *records, truncation="keep_end", sequence_length=96)
    assert (made.counts["identical"], made.counts["examples"], made.counts["truncated"]) == (0, 5, 1)
    with pytest.raises(
        LuthierError, match=r"a\.jsonl: truncation='keep_start' leaves no difference between answers at"
    ):
        of(tmp_path, records[2], truncation="keep_start", sequence_length=96)


def logprob_of(tokens, position):
    """A number that only this target in this context has."""
    return -float(position + 1) - 0.001 * (hash(tuple(tokens)) % 997)


@pytest.mark.parametrize("truncation", ["error", "keep_end"])
def test_reference_log_probabilities_come_back_where_they_were_put(tmp_path, truncation):
    """Computed once over all stretches, written by place, read with the rows: those of the token in its own answer."""
    length = 128 if truncation == "error" else 40
    sections = tuple(
        config.data(file_of(tmp_path / f"{n}.jsonl", pairs(size, seed=n)), truncation=truncation)
        for n, size in enumerate((23, 9))
    )
    made = built(sections, sequence_length=length, prompt_length=1, batch_size=3)

    def expected(rows):
        values = np.zeros(rows["tokens"].shape, np.float32)
        for row, t in zip(*np.nonzero(rows["loss_weights"])):
            mine = np.flatnonzero(rows["segment_ids"][row] == rows["segment_ids"][row, t])
            context = rows["tokens"][row, mine[1] : t + 2].tolist()
            values[row, t] = logprob_of(context, rows["positions"][row, t])
        return values

    files = [np.full(int(part.tokens.offsets[-1]), np.nan, np.float32) for part in made.parts]
    seen = []
    for part, rows, places in made.stretches():
        assert rows["tokens"].shape == places.shape == (3, length) and places.dtype == np.int64
        np.testing.assert_array_equal(places >= 0, rows["loss_weights"] > 0)
        ids = np.fromfile(made.parts[part].tokens.folder / "ids.bin", np.int32)
        np.testing.assert_array_equal(ids[places[places >= 0]], rows["targets"][places >= 0])
        files[part][places[places >= 0]] = expected(rows)[places >= 0]
        seen += [(part, place) for place in places[places >= 0].tolist()]
    assert (
        len(seen)
        == len(set(seen))
        == made.counts["targets"] + (truncation == "keep_end") * (len(seen) - made.counts["targets"])
    )
    paths = [tmp_path / f"{n}.f32" for n in range(2)]
    for path, values in zip(paths, files):
        values.tofile(path)
    known = made.reference(paths)
    for step in range(9):
        rows = known.rows(step)
        np.testing.assert_array_equal(rows["reference_logps"], expected(rows))
        assert rows["reference_logps"].dtype == np.float32 and set(rows) - set(made.rows(step)) == {"reference_logps"}
    assert len({part.fingerprint for part in made.parts}) == 2
    files[1][files[1] < 0] = np.nan
    files[1].tofile(paths[1])
    with pytest.raises(LuthierError, match=r"1\.f32: a target has no log-probability"):
        epoch_of(known)
    files[0][:4].tofile(paths[0])
    np.zeros_like(files[1]).tofile(paths[1])
    with pytest.raises(LuthierError, match=r"0\.f32: .* is too short"):
        epoch_of(known)


PREVIEWS = [
    (PAIR, {}, ["chosen: completion", "rejected: completion"]),
    (LABELLED[0], {"answers": 1, "mismatched": True}, ["desirable: completion", "mismatched: completion"]),
    (GROUPS["ranked"][0], {"answers": 3, "most": 3}, [f"answer {n}" for n in (1, 2, 3)]),
]


@pytest.mark.parametrize("record,options,names", PREVIEWS)
def test_the_preview_shows_every_answer_by_its_name(tmp_path, record, options, names):
    records = [record] if "label" not in record else LABELLED
    shown = of(tmp_path, *records, **options).preview(1)
    assert len(shown) == len(names)
    for answer, name in zip(shown, names):
        trained = [(token, role) for token, role, weight in answer if weight]
        assert trained and all(role.startswith(name) for _, role in trained) and trained[-1][0] == END


L = LABELLED[0]
K3 = GROUPS["ranked"][0]
# Record (line 2), options, the message.
BAD = [
    ({**PAIR, "rejected": ""}, {}, r"a\.jsonl:2: 'rejected' is empty\. Delete"),
    ({**PAIR, "chosen": " \n"}, {}, r"a\.jsonl:2: 'chosen' is empty"),
    ({**PAIR, "chosen": []}, {}, r"a\.jsonl:2: 'chosen' is empty"),
    ({**PAIR, "chosen": 3}, {}, r"a\.jsonl:2: 'chosen' is not a list of messages"),
    ({**PAIR, "rejected": None}, {}, r"a\.jsonl:2: no field 'rejected' in a preference record"),
    ({"prompt": [U("a")], "chosen": [A("")], "rejected": [A("b")]}, {}, r"a\.jsonl:2: chosen: an assistant message is"),
    ({"chosen": "Yes", "rejected": "No"}, {}, r"a\.jsonl:2: the answers begin alike nowhere, .*Add a field 'prompt'"),
    (
        {"chosen": [U("a"), A("b")], "rejected": [U("c"), A("b")]},
        {},
        r"a\.jsonl:2: the answers have different first messages",
    ),
    (
        {"chosen": [chat_cases.SYSTEM, U("a"), A("b")], "rejected": [chat_cases.SYSTEM, U("c"), A("b")]},
        {},
        r"a\.jsonl:2: the answers have different first messages",
    ),
    (
        {"prompt": "a", "chosen": [U("a"), A("b")], "rejected": [A("b")]},
        {},
        r"a\.jsonl:2: one answer repeats the prompt and the other does not",
    ),
    (
        {"prompt": "c", "chosen": [U("a"), A("b")], "rejected": [U("a"), A("c")]},
        {},
        r"a\.jsonl:2: 'prompt' is no user turn of those that the answers begin with\. Mend it, or leave it out",
    ),
    ({"chosen": "a b", "rejected": [U("a"), A("b")]}, {}, r"a\.jsonl:2: one answer is text and the other messages"),
    (
        {"chosen": [U("a"), A("b"), U("c"), A("d")], "rejected": [U("a"), A("b"), U("e"), A("d")]},
        {},
        r"a\.jsonl:2: the answers part at a user message\. Set data\.train_on='assistant'",
    ),
    ({**PAIR, "score_chosen": 1.0}, {}, r"a\.jsonl:2: the record has 'score_chosen' alone"),
    ({**PAIR, "score_chosen": "8", "score_rejected": 1}, {}, r"a\.jsonl:2: 'score_chosen' is text, expected a number"),
    ({**PAIR, "score_chosen": 8, "score_rejected": True}, {}, r"a\.jsonl:2: 'score_rejected' is a boolean, expected"),
    ({**PAIR, "score_chosen": 8, "score_rejected": 1.5}, {}, r"a\.jsonl:1: the record has no scores and others"),
    ({**PAIR, "rejected": ["a", "b"]}, {}, r"a\.jsonl:2: the record has 3 answers, at most 2 .*data\.answers=3"),
    ({**PAIR, "chosen": " blue" * 400}, {}, r"a\.jsonl:2: the 2 answers .* have \d+ tokens, .* is 128; 1 of 2 groups"),
    ({**PAIR, "chosen": " blue" * 400}, {"prompt_length": 2}, r"have \d+ tokens, 2 of a soft prompt each included"),
    ({**L, "label": 1}, {"answers": 1}, r"a\.jsonl:2: the label is a number, expected true or false"),
    ({**L, "label": "no"}, {"answers": 1}, r"a\.jsonl:2: the label is text, expected true or false"),
    ({**L, "label": None}, {"answers": 1}, r"a\.jsonl:2: the label is missing"),
    ({**L, "completion": ""}, {"answers": 1}, r"a\.jsonl:2: 'completion' is empty"),
    (L, {"answers": 1}, r"a\.jsonl: every completion is labelled desirable; KTO .* need both\. Add"),
    ({**L, "prompt": [U("a")]}, {"answers": 1, "mismatched": True}, r"a\.jsonl:\d: .* are not both text or both mess"),
    ({**K3, "scores": [1, 2]}, {"answers": 3, "most": 3}, r"a\.jsonl:2: 3 completions and 2 scores"),
    ({**K3, "scores": [1, "2", 3]}, {"answers": 3, "most": 3}, r"a\.jsonl:2: 'scores\[1\]' is text, expected a number"),
    ({**K3, "scores": [1, float("nan"), 3]}, {"answers": 3, "most": 3}, r"a\.jsonl:2: 'scores\[1\]' is nan, expected"),
    ({**K3, "scores": None}, {"answers": 3, "most": 3}, r"a\.jsonl:2: the record has no list 'scores'"),
    ({**K3, "completions": " a"}, {"answers": 3, "most": 3}, r"a\.jsonl:2: 'completions' is not a list of answers"),
    ({**K3, "completions": [" a"], "scores": [1]}, {"answers": 3, "most": 3}, r"a\.jsonl:2: 1 completions: there is"),
    ({**K3, "completions": [" a", "", " b"]}, {"answers": 3, "most": 3}, r"a\.jsonl:2: 'completions\[1\]' is empty"),
    (
        {**K3, "completions": [*K3["completions"], " x"], "scores": [1, 2, 3, 4]},
        {"answers": 4, "most": 3},
        r"a\.jsonl:2: the record has 4 answers, at most 3 .* Set data\.answers=4",
    ),
    (
        {"instruction": "a", "completions": [{"response": "b"}, {"response": "c", "overall_score": 1.0}]},
        {"answers": 3, "most": 3},
        r"a\.jsonl:2: 'scores\[0\]' is missing",
    ),
]


@pytest.mark.parametrize("record,options,message", BAD)
def test_bad_records_are_one_clear_line(tmp_path, record, options, message):
    first = L if "label" in record else K3 if "completions" in record else PAIR
    with pytest.raises(LuthierError, match=message) as error:
        of(tmp_path, first, record, **options)
    assert "\n" not in str(error.value)


MISPLACED = [
    ({"text": "The sky"}, {}, r"a\.jsonl:1: text records have no answers to compare\. Give chosen and rejected"),
    ({"prompt": "a", "completion": "b"}, {"answers": 1}, r"a\.jsonl:1: prompt_completion records have no answers"),
    ({"prompt": "a", "completions": ["b"], "labels": [True]}, {}, r"a\.jsonl:1: stepwise records have no answers"),
    (K3, {"answers": 1}, r"a\.jsonl:1: ranked_preference records compare answers; this objective reads single answers"),
    (K3, {"mismatched": True}, r"a\.jsonl:1: ranked_preference records compare answers"),
    (L, {}, r"a\.jsonl:1: unpaired_preference records have one labelled answer each; this objective compares"),
    (PAIR, {"format": "preferences"}, r"data\.format: unknown format 'preferences'\. Did you mean 'preference'"),
    (PAIR, {"roles": {"x": "usr"}}, r"data\.roles: unknown role 'usr'\. Did you mean 'user'"),
    (PAIR, {"shots": 1}, r"data\.shots: preference records take no demonstrations"),
    (PAIR, {"answers": 0}, r"a\.jsonl:1: preference records: they need a preference loss .* spec\(\"dpo\"\)"),
    (K3, {"answers": 0}, r"a\.jsonl:1: ranked_preference records: they need a preference loss"),
    (
        {**PAIR, "chosen": " blue" * 400},
        {"truncation": "keep_end", "sequence_length": 8, "prompt_length": 3},
        r"stage\.sequence_length: 8 tokens leave 1 for each of 2 answers",
    ),
    (
        {**PAIR, "prompt": "a " * 99},
        {"truncation": "keep_start"},
        r"a\.jsonl: truncation='keep_start' leaves no group of which every answer has a target",
    ),
]


@pytest.mark.parametrize("record,options,message", MISPLACED)
def test_records_and_options_that_do_not_fit(tmp_path, record, options, message):
    with pytest.raises(LuthierError, match=message):
        of(tmp_path, record, record, **options)


def test_parts_agree_on_scores(tmp_path):
    scored = file_of(tmp_path / "a.jsonl", pairs(3, score_chosen=2, score_rejected=1))
    plain = file_of(tmp_path / "b.jsonl", pairs(3))
    with pytest.raises(LuthierError, match=r"stage\.data: .*a\.jsonl has scores and .*b\.jsonl has none\. Give"):
        built((config.data(scored), config.data(plain)))
    without = config.data(scored, columns={name: name for name in ("prompt", "chosen", "rejected")})
    assert not built((without, config.data(plain))).has_scores


def test_tokens_are_kept_by_answers_mismatching_and_format(tmp_path):
    """Each of these has a cache of its own; another length, size of batch or seed has none."""
    made = [
        of(tmp_path, *LABELLED, answers=1),
        of(tmp_path, *LABELLED, answers=1, sequence_length=64, batch_size=3),
        of(tmp_path, *LABELLED, mismatched=True),
        of(tmp_path, *[{k: v for k, v in record.items() if k != "label"} for record in LABELLED], answers=0),
    ]
    keys = [one.parts[0].tokens.key for one in made]
    assert keys[0] == keys[1] and len(set(keys)) == 3


GOLDEN = json.loads(GOLDENS.read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_are_those_of_trl(tmp_path, name):
    """Prompts and answers of DPOTrainer and KTOTrainer, mismatched ones too; a turn without the break after it."""
    lines, line_break = GOLDEN[name], chat_cases.tokenizer("smollm2").encode("\n")
    is_labelled = "label" in lines[0]["record"]
    keys = ("completion_ids", "KL_completion_ids") if is_labelled else ("chosen_ids", "rejected_ids")
    made = of(tmp_path, *(line["record"] for line in lines), mismatched=is_labelled, batch_size=1)
    found, expected = [], []
    for rows in (made.rows(step) for step in range(made.rows_per_epoch)):
        for first in range(1, rows["segment_ids"].max() + 1, 2):
            sides = [rows["segment_ids"] == segment for segment in (first, first + 1)]
            found.append(
                [(rows["tokens"][s].tolist(), rows["targets"][s][rows["loss_weights"][s] > 0].tolist()) for s in sides]
            )
    for line in lines:
        group = []
        for key in keys:
            ended = len(line[key]) - (line[key][-1:] == line_break and "messages" in name)
            group.append((line["prompt_ids"] + line[key], line[key][:ended]))
        expected.append(group)
    assert sorted(found) == sorted(expected)


def test_the_lines_of_the_documentation_are_read_as_it_says(tmp_path):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "data.md").read_text()
    lines = re.findall(r"^\| (?:`(\w+)`)? *\| ([\w ]*)\| `({.*})` \| .* \|$", page, re.MULTILINE)
    name, kind, seen = "", "", set()
    for told, losses, line in lines:
        name, kind = told or name, losses.strip() or kind
        record = json.loads(line)
        key = next((key for key in ("label", "kto_tag") if key in record), None)
        both = [record, {**record, key: False}] if key else [record]
        made = of(tmp_path, *both, answers={"pairs": 2, "labels": 1, "K answers": 3}[kind], most=3)
        assert detect(record) == name and made.counts["examples"] == len(both)
        seen.add((name, kind))
    assert len(lines) == 13 and {name for name, _ in seen} == set(PREFERENCES)
