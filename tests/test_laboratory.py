"""The laboratory's generator: deterministic, held-out parts held out, targets and answers right."""

import itertools
import json
import pathlib
import random
import re

import laboratory
import numpy as np
import pytest
from laboratory import episodes as made
from laboratory import formats, gate, language, suite, tasks
from laboratory.make import write_episodes

from luthier import config, weights
from luthier.data.batches import build
from luthier.data.tokenizer import Tokenizer
from luthier.evals import verifiers
from luthier.evals.cases import few_shot, read_cases, shot_pool

FAMILIES = {**tasks.FAMILIES, **tasks.HELD_OUT_FAMILIES}
TOKENIZER = Tokenizer.from_files(language.tokenizer_files())
SAMPLE = list(made.episodes(300, seed=0))


def test_episode_depends_on_seed_and_number_alone():
    assert list(made.episodes(20, seed=0)) == SAMPLE[:20]
    assert list(made.episodes(20, seed=1)) != SAMPLE[:20]
    assert all(2 < len(ids) == len(kinds) <= made.LONGEST for ids, kinds in SAMPLE)


def test_tokenizer_and_texts_go_both_ways():
    words = language.vocabulary()
    assert len(set(words)) == len(words) == TOKENIZER.vocab_size < 700
    assert not any(" " in word for word in words)
    assert TOKENIZER.pad_id not in TOKENIZER.eos_ids and TOKENIZER.bos_id is not None
    assert len(set().union(*language.LANGUAGES.values())) == 4 * len(language.LEXICON), "languages share no word"
    for ids, _ in SAMPLE[:100]:
        text = TOKENIZER.decode(ids, skip_special=True)
        assert TOKENIZER.encode(text) == made.encode(text) == ids[1:-1]
        assert TOKENIZER.encode(text, special=True) == ids[:-1] and "<unk>" not in text


def test_held_out_formats_and_tasks_never_occur_in_pretraining():
    trained = formats.trained_formats(made.FORMATS, seed=0)
    assert len(set(trained)) == made.FORMATS and len(formats.HELD_OUT) == 12
    opened = formats.open_formats(2000, seed=0)
    assert opened == formats.open_formats(2000, seed=0) and len(set(opened)) == 2000
    held_out = {
        *language.HELD_OUT_FIELDS, *language.HELD_OUT_MARKS, *language.HELD_OUT_WRAPS, *formats.HELD_OUT_LAYOUTS
    }  # fmt: skip
    parts = lambda f: {*f.fields, f.mark, f.wrap, f.layout}  # noqa: E731
    assert not any(parts(form) & held_out for form in trained)
    words = lambda f: {*f.layout.split(), *f.wrap, f.between_items, f.between_groups}  # noqa: E731
    single = {word for part in held_out for word in ([part] if isinstance(part, str) else part) if "{" not in part}
    assert not any(words(form) & (single - {""}) for form in opened)
    assert all(parts(form) & held_out and not form.names_task for form in formats.HELD_OUT.values())
    assert not tasks.FAMILIES.keys() & tasks.HELD_OUT_FAMILIES.keys()
    # And in the texts themselves: no prompt can be read as one of a held-out format.
    blank = [re.escape(form.prompt((("INPUT",),))) for form in formats.HELD_OUT.values()]
    read = re.compile("|".join(blank).replace("INPUT", "[^\n]+"))
    for form in formats.HELD_OUT.values():
        assert read.fullmatch(form.prompt((("a", "b"), ("c",))))
    end = language.SPECIAL.index("</s>")
    for ids, kinds in [*SAMPLE, *made.episodes(300, seed=1, open_share=0.7)]:
        for is_answer, run in itertools.groupby(zip(ids, kinds), key=lambda pair: pair[1] == made.ANSWER):
            prompt = [token for token, _ in run]
            if not is_answer:
                assert end not in prompt and not read.fullmatch(TOKENIZER.decode(prompt, skip_special=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_the_answers_and_verify(name):
    rng = random.Random(name)
    for form in [*rng.sample(formats.trained_formats(made.FORMATS, seed=0), 6), *formats.HELD_OUT.values()]:
        task = FAMILIES[name](rng)
        problems = made.problems(task, rng, 4)
        assert task.name == name and problems
        ids, kinds = made.episode(task, form, problems)
        groups_of = itertools.groupby(zip(ids, kinds), key=lambda pair: pair[1] == made.ANSWER)
        runs = [[token for token, _ in run] for is_answer, run in groups_of if is_answer]
        assert len(runs) == len(problems)
        assert [run[-1] for run in runs[:-1]] == [TOKENIZER.id_of("\n\n")] * (len(runs) - 1)
        assert runs[-1][-1] == TOKENIZER.eos_id == ids[-1]
        for run, (groups, answer) in zip(runs, problems):
            text = TOKENIZER.decode(run[:-1])
            assert answer == task.solve(groups) == form.answer_of(text)
            record = {"prompt": form.prompt(groups, task.instruction), "completion": form.completion(answer)}
            assert verifiers.exact(text, record) == 1
            assert not task.options or answer in task.options
            assert form.answer_of(" nonsense ~ ~") != answer


@pytest.mark.parametrize(
    ("name", "groups", "answer"),
    [
        ("copy", ["a b c"], "a b c"),
        ("reverse", ["a b c"], "c b a"),
        ("first", ["d b"], "d"),
        ("second", ["d b e"], "b"),
        ("last", ["d b e"], "e"),
        ("rotate", ["a b c"], "b c a"),
        ("swap", ["a b c d"], "d b c a"),
        ("double", ["x y"], "x x y y"),
        ("drop_first", ["a b c"], "b c"),
        ("drop_last", ["a b c"], "a b"),
        ("ends", ["a b c d"], "a d"),
        ("count", ["a b c d e"], "5"),
        ("sort_letters", ["d a c"], "a c d"),
        ("sort_numbers", ["10 9 80"], "9 10 80"),
        ("sort_down", ["10 9 80"], "80 10 9"),
        ("largest", ["9 10"], "10"),
        ("smallest", ["9 10"], "9"),
        ("next_letter", ["a y"], "b z"),
        ("previous_letter", ["b z"], "a y"),
        ("plus", ["7", "8"], "15"),
        ("minus", ["12", "5"], "7"),
        ("sequence", ["3 7 11"], "15"),
        ("sum_of_three", ["7 8 20"], "35"),
        ("sum_of_large", ["21 30 33"], "84"),
        ("category", ["violin"], "music"),
        ("outlier", ["cat rain dog"], "rain"),
        ("lookup", ["a 1 b 2 c 3", "b"], "2"),
        ("last_two_swapped", ["a b c d"], "a b d c"),
        ("parity", ["17"], "Q"),
        ("fifty", ["50"], "Q"),
        ("compare", ["9", "10"], "Q"),
        ("compare", ["10", "9"], "P"),
        ("same_item", ["a", "a"], "P"),
        ("same_kind", ["cat", "dog"], "P"),
        ("same_kind", ["cat", "rain"], "Q"),
        ("member", ["a b c d", "e"], "Q"),
        ("vowel", ["e"], "P"),
        ("palindrome", ["a b a"], "P"),
        ("entails", ["a b c d", "d a"], "P"),
        ("entails", ["a b c d", "d e"], "Q"),
        ("ordered", ["a c b"], "Q"),
    ],
)
def test_answers_by_hand(name, groups, answer):
    """Classes are called P (the first) and Q."""
    family = FAMILIES[name]
    task = (family.labelled(("P", "Q")) if hasattr(family, "labelled") else family)(random.Random(0))
    assert " ".join(task.solve(tuple(tuple(group.split()) for group in groups))) == answer


def test_words_of_the_format_are_targets_from_the_second_example_on():
    form = formats.Format("{a} {m} {x}\n{b} {m}", ("input", "output"), ":", ("[", "]"), names_task=True)
    task = FAMILIES["last"](random.Random(0))
    ids, kinds = made.episode(task, form, [((("a", "b"),), ("b",)), ((("c", "d", "e"),), ("e",))])
    told = dict(enumerate("IFA"))
    found = [f"{told[kind]}{language.vocabulary()[token]}" for token, kind in zip(ids, kinds)]
    first = "I<s> Ilast I\n Iinput I: Ia Ib I\n Ioutput I: A[ Ab A] A\n\n"
    second = "Flast F\n Finput F: Ic Id Ie F\n Foutput F: A[ Ae A] A</s>"
    assert found == f"{first} {second}".split(" ")


def test_hidden_parts_are_told_by_the_instruction():
    """A constant, the labels, and words of other languages there and back."""
    added = FAMILIES["add_constant"](random.Random(0))
    assert added.solve((("30",),)) == (str(30 + int(added.instruction[1])),)
    labelled = FAMILIES["parity"].labelled(("up", "down"))(random.Random(0))
    assert " ".join(labelled.instruction) == "parity even up odd down" and labelled.options == (("up",), ("down",))
    chosen = FAMILIES["choose_category"](random.Random(3))
    told = dict(zip(chosen.instruction[1::2], chosen.instruction[2::2]))
    for groups, answer in made.problems(chosen, random.Random(0), 8):
        assert answer == (told[tasks.category_of(groups[0][0])],)
    there, back = (FAMILIES[name](random.Random(0)) for name in ("plain_to_bakan", "bakan_to_plain"))
    assert back.solve((there.solve((("cat", "red"),)),)) == ("cat", "red")


def test_classes_are_balanced():
    for name in ("same_kind", "entails", "ordered", "vowel"):
        rng = random.Random(0)
        task = FAMILIES[name].labelled(("P", "Q"))(rng)
        share = np.mean([task.solve(task.draw(rng)) == ("P",) for _ in range(400)])
        assert abs(share - 0.5) < 0.1, name


def test_gate_asks_the_same_with_and_without_demonstrations():
    for name in formats.HELD_OUT:
        zero, four = (made.gate_questions(name, shots, 30) for shots in (0, 4))
        for without, with_four in zip(zero, four):
            assert without["completion"] == with_four["completion"]
            *solved, last = with_four["prompt"].split(made.SEPARATOR)
            assert last == without["prompt"] and len(solved) == 4
            assert not any(demonstration.startswith(last) for demonstration in solved)


def test_library_trains_on_the_answers(tmp_path):
    file = tmp_path / "episodes.parquet"
    tokens, targets = write_episodes(file, 40)
    assert tokens == sum(len(ids) for ids, _ in SAMPLE[:40])
    assert targets == sum(kind != made.INPUT for _, kinds in SAMPLE[:40] for kind in kinds)
    recipe = config.load(f"{pathlib.Path(laboratory.__file__).parent}/config.py:{tmp_path}")
    stage, later = recipe.stages
    assert later.data.source == f"{tmp_path}/open.parquet" and later.data.format == stage.data.format
    assert recipe.model.source == f"{tmp_path}/model"
    options = {"sequence_length": stage.sequence_length, "batch_size": stage.batch_size, "seed": 0}
    batches = build(stage.data, tokenizer=TOKENIZER, cache_dir=tmp_path / "cache", **options)
    assert batches.counts["examples"] == 40 and batches.counts["targets"] == targets


def test_records_differ_and_have_options():
    form = formats.HELD_OUT["braces"]
    found = made.records("entails", form, 50, seed=0, labels=("true", "false"))
    assert len({record["prompt"] for record in found}) == 50
    assert {record["completion"] for record in found} == {" { true }", " { false }"} == set(found[0]["options"])


def test_suite_shares_no_problem_and_asks_as_the_library_does(tmp_path, monkeypatch):
    for part in ("TRAIN", "DEV", "TEST"):
        monkeypatch.setattr(suite, part, 40)
    suite.write(tmp_path)
    new = {entry.family for label, entry in suite.TARGETS.items() if label != "odd"}
    assert new <= tasks.HELD_OUT_FAMILIES.keys()
    assert not any(entry.form.names_task for entry in suite.FEW_SHOT.values())
    for spec in suite.evaluations(tmp_path, suite.ALL, limit=5, apart=("prompt",)):
        assert spec.retention == (spec.label in suite.FEW_SHOT or spec.label in suite.NAMED)
        assert (spec.label in suite.TARGETS) == (spec.without == ())
        cases = read_cases(spec.data)
        names = ("test", "train", *(("dev",) if spec.label in suite.TARGETS else ()))
        parts = [read_cases(spec.data.replace("test.jsonl", f"{name}.jsonl")) for name in names]
        assert len(cases) == 40 and len({case.prompt for part in parts for case in part}) == sum(map(len, parts))
        prompt = few_shot(cases[:1], shot_pool(spec.shots, spec.shots_from), spec.shots, 0)[0]
        assert prompt.count(made.SEPARATOR) == spec.shots
        ids = TOKENIZER.encode(prompt + cases[0].answer)
        assert TOKENIZER.id_of("<unk>") not in ids and len(ids) < made.LONGEST


def test_chance_is_that_of_naming_what_is_listed(tmp_path):
    suite.write(tmp_path)
    chances = {spec.label: spec.chance for spec in suite.evaluations(tmp_path, suite.ALL)}
    assert chances["ordered"] == 0.5 and chances["outlier"] == chances["odd"] == pytest.approx(1 / 3)
    assert chances["odd-of-five"] == pytest.approx(1 / 5) and chances["to-bakan"] < 0.01
    for label, kind in (("largest", r"\d+"), ("lookup", r"\d+")):
        records = map(json.loads, (tmp_path / label / "test.jsonl").open())
        listed = [re.findall(kind, record["prompt"]) for record in records]
        assert chances[label] == pytest.approx(sum(1 / len(set(one)) for one in listed) / len(listed)), label
    counts = [json.loads(line)["completion"] for line in (tmp_path / "told-count" / "test.jsonl").open()]
    assert chances["told-count"] == pytest.approx(max(map(counts.count, counts)) / len(counts))


def test_committed_model_passed_the_gate():
    passed = json.loads((laboratory.MODEL.parent / "gate.json").read_text())
    assert passed["fingerprint"] == weights.describe(str(laboratory.MODEL)).fingerprint
    assert len(passed["passed"]) >= gate.FORMATS == 6 and set(passed["passed"]) <= formats.HELD_OUT.keys()
    for name in passed["passed"]:
        row = passed["formats"][name]
        assert row["n"] == 300 and row["accuracy"]["4"] - row["accuracy"]["0"] >= gate.POINTS == 0.2
    assert (laboratory.MODEL / "model.safetensors").stat().st_size < 20e6
