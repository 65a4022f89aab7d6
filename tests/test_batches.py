"""Packed rows: the same examples as unpacked, for any step, on any process, from any cache."""

import json
import logging
import os
import threading

import chat_cases
import numpy as np
import pytest
import tiny_bucket
from tiny_text import tiny_tokenizer

from luthier import config
from luthier.data import batches, cache, sources
from luthier.data.demonstrations import drawn, with_demonstrations
from luthier.data.records import Chat, Segment, Text
from luthier.errors import LuthierError

WORDS = "the sky is blue and sea wide deep answer question how many".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def records(count, seed=0):
    random = np.random.RandomState(seed)

    def words(most):
        return " ".join(WORDS[i] for i in random.randint(0, len(WORDS), random.randint(1, most)))

    return [{"prompt": f"{seed}.{i}: {words(12)}", "completion": f" {words(30)}"} for i in range(count)]


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def built(
    data, *, tokenizer=None, template=None, sequence_length=64, batch_size=4, seed=0, packing="best_fit", **options
):
    tokenizer = tokenizer or tiny_tokenizer()
    sections = data if isinstance(data, tuple) else (config.data(data, **options),)
    return batches.build(
        sections if len(sections) > 1 else sections[0],
        tokenizer=tokenizer,
        template=template,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        packing=packing,
    )


def epoch_of(made):
    """All rows of the first epoch, row by row."""
    rows = [
        made.rows(g // made.batch_size, g % made.batch_size, g % made.batch_size + 1)
        for g in range(made.rows_per_epoch)
    ]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def segments(rows):
    """Every example of some rows as (tokens, targets, weights, positions), in a canonical order."""
    found = []
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            mine = rows["segment_ids"][row] == segment
            assert np.ptp(np.flatnonzero(mine)) == mine.sum() - 1, "an example lies in one piece"
            found.append(
                tuple(tuple(rows[k][row][mine].tolist()) for k in ("tokens", "targets", "loss_weights", "positions"))
            )
    return sorted(found)


def expected_segments(rows, tokenizer):
    """What the examples are, made by hand from the tokenizer alone."""
    found = []
    for record in rows:
        prompt, whole = tokenizer.encode(record["prompt"]), tokenizer.encode(record["prompt"] + record["completion"])
        whole = [*whole, tokenizer.eos_id]
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
        weights = [1.0 if i + 1 >= shared else 0.0 for i in range(len(whole) - 1)] + [0.0]
        found.append((tuple(whole), tuple(whole[1:]) + (tokenizer.pad_id,), tuple(weights), tuple(range(len(whole)))))
    return sorted(found)


def test_demonstrations_come_before_the_prompt(tmp_path):
    """Every example once, each after so many others as they were written; only its own answer is trained."""
    rows, tokenizer = records(20), tiny_tokenizer()
    epoch = epoch_of(built(file_of(tmp_path / "a.jsonl", rows), sequence_length=256, shots=2))
    whole = {row["prompt"] + row["completion"]: row for row in rows}
    asked = []
    for tokens, targets, weights, _ in segments(epoch):
        *shots, last = tokenizer.decode(tokens[:-1]).split("\n\n")
        assert len(set(shots) | {last}) == 3 and {*shots, last} <= whole.keys()
        trained = tokenizer.decode([token for token, weight in zip(targets, weights) if weight][:-1])
        assert whole[last]["completion"].strip() == trained.strip()
        asked.append(last)
    assert sorted(asked) == sorted(whole)


def test_chats_have_demonstrations_as_earlier_turns():
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    chat = lambda n: Chat((turn("system", "S"), turn("user", f"q{n}"), turn("assistant", f"a{n}")), 2)  # noqa: E731
    made = with_demonstrations(chat(0), [chat(1), chat(2)], "x")
    assert [m["content"] for m in made.messages] == ["S", "q1", "a1", "q2", "a2", "q0", "a0"] and made.prompt_turns == 6
    with pytest.raises(LuthierError, match="of one kind"):
        with_demonstrations(chat(0), [Text((Segment("text", "x"),))], "x")
    with pytest.raises(LuthierError, match="3 demonstrations of 3 examples"):
        drawn(0, 3, 3)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_an_epoch_holds_every_example_once_exactly_as_it_is(tmp_path, packing):
    rows = records(101)
    made = built(file_of(tmp_path / "a.jsonl", rows), packing=packing)
    epoch = epoch_of(made)
    assert segments(epoch) == expected_segments(rows, tiny_tokenizer())
    padding = epoch["segment_ids"] == 0
    assert not epoch["loss_weights"][padding].any() and not epoch["positions"][padding].any()
    assert (epoch["segment_ids"].max() > 1) == (packing == "best_fit")
    assert made.counts["examples"] == 101 and made.counts["tokens"] == (~padding).sum()
    assert made.counts["targets"] == np.count_nonzero(epoch["loss_weights"])
    assert made.counts["packing_efficiency"] == pytest.approx(np.mean(~padding))


def test_arrays_have_the_names_and_types_of_the_contract(tmp_path):
    rows = built(file_of(tmp_path / "a.jsonl", records(9))).rows(0)
    assert {k: (v.shape, v.dtype.name) for k, v in rows.items()} == {
        "tokens": ((4, 64), "int32"),
        "targets": ((4, 64), "int32"),
        "loss_weights": ((4, 64), "float32"),
        "segment_ids": ((4, 64), "int32"),
        "positions": ((4, 64), "int32"),
    }


def same(first, second):
    return all(np.array_equal(first[key], second[key]) for key in first)


def test_any_step_on_any_process(tmp_path):
    path = file_of(tmp_path / "a.jsonl", records(40))
    made = built(path)
    straight = [made.rows(step) for step in range(40)]  # several epochs, whose ends fall inside batches
    assert made.rows_per_epoch % 4 and 40 * 4 > 4 * made.rows_per_epoch
    again = built(path)
    for step in (37, 0, 21, 5):  # resumed anywhere, in any order
        assert same(again.rows(step), straight[step])
        halves = [built(path).rows(step, 0, 2), made.rows(step, 2, 4)]
        assert same({k: np.concatenate([h[k] for h in halves]) for k in halves[0]}, straight[step])
        ragged = [made.rows(step, 0, 1), made.rows(step, 1, 1), made.rows(step, 1, 4)]
        assert same({k: np.concatenate([h[k] for h in ragged]) for k in ragged[0]}, straight[step])
    assert not same(straight[0], built(path, seed=1).rows(0))


def test_epochs_differ_and_each_is_complete(tmp_path):
    rows = records(30)
    made = built(file_of(tmp_path / "a.jsonl", rows), batch_size=1)
    expected = expected_segments(rows, tiny_tokenizer())
    epochs = [
        [made.rows(epoch * made.rows_per_epoch + row) for row in range(made.rows_per_epoch)] for epoch in range(3)
    ]
    joined = [{k: np.concatenate([row[k] for row in epoch]) for k in epoch[0]} for epoch in epochs]
    assert all(segments(epoch) == expected for epoch in joined)
    assert not same(joined[0], joined[1]) and not same(joined[1], joined[2])


@pytest.mark.parametrize("parts", [1, 2])
def test_epochs_and_tokens_before_a_step(tmp_path, parts):
    sections = tuple(config.data(file_of(tmp_path / f"{n}.jsonl", records(20 + n, seed=n))) for n in range(parts))
    made, tokens = built(sections, batch_size=2), 0
    for step in range(30):
        assert made.tokens_before(step) == built(sections, batch_size=2).tokens_before(step) == tokens
        tokens += np.count_nonzero(made.rows(step)["segment_ids"])
        if parts == 1:
            assert made.epoch(step) == pytest.approx(2 * step / made.rows_per_epoch)


def test_threads_may_ask_at_once(tmp_path):
    path = file_of(tmp_path / "a.jsonl", records(60))
    straight = [built(path).rows(step) for step in range(30)]
    made, found = built(path), {}
    threads = [threading.Thread(target=lambda s=s: found.__setitem__(s, made.rows(s))) for s in reversed(range(30))]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(same(found[step], straight[step]) for step in range(30))


@pytest.mark.parametrize("rates", [(3.0, 1.0), (1.0, 1.0), (1.0, 9.0)])
def test_a_mixture_has_its_rates_in_every_epoch(tmp_path, rates):
    tokenizer = tiny_tokenizer()
    paths = [file_of(tmp_path / f"{n}.jsonl", records(size, seed=n)) for n, size in enumerate((60, 20))]
    sections = tuple(config.data(path, rate=rate) for path, rate in zip(paths, rates))
    made = built(sections, batch_size=1, packing="none")
    seen = []
    for step in range(3 * 80):
        row = made.rows(step)
        seen.append(tokenizer.decode(row["tokens"][0][row["segment_ids"][0] == 1]).split(":")[0].split("."))
    assert made.rows_per_epoch == 80
    for epoch in range(3):
        of_second = sum(part == "1" for part, _ in seen[80 * epoch : 80 * epoch + 80])
        assert of_second == round(80 * rates[1] / sum(rates))
    for part, size in (("0", 60), ("1", 20)):  # each source goes through its own examples evenly
        times = np.bincount([int(i) for p, i in seen if p == part], minlength=size)
        assert times.max() - times.min() <= 1
    packed = built(sections, batch_size=1)
    assert same(packed.rows(200), built(sections, batch_size=1).rows(200))


def test_sources_of_one_size_are_not_read_in_one_order(tmp_path):
    sections = tuple(config.data(file_of(tmp_path / f"{n}.jsonl", records(30, seed=n))) for n in range(2))
    made = built(sections, batch_size=1, packing="none")
    orders = {0: [], 1: []}
    for chosen in made._examples(0):
        orders[int(chosen >= 30)].append(int(chosen % 30))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30)) and orders[0] != orders[1]


def test_eos_is_a_target_once_though_it_is_also_the_padding(tmp_path):
    rows = records(25)
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    assert tokenizer.pad_id == tokenizer.eos_id
    other = tiny_tokenizer(pad_token="<|endoftext|>")
    path = file_of(tmp_path / "a.jsonl", rows)
    same_id, other_id = (epoch_of(built(path, tokenizer=t)) for t in (tokenizer, other))
    trained_eos = (same_id["loss_weights"] > 0) & (same_id["targets"] == tokenizer.eos_id)
    assert trained_eos.sum() == 25
    assert np.array_equal(same_id["loss_weights"], other_id["loss_weights"])
    assert np.all(other_id["tokens"][other_id["segment_ids"] == 0] == other.pad_id)


def lengths_of(rows):
    tokenizer = tiny_tokenizer()
    return [len(tokenizer.encode(r["prompt"] + r["completion"])) + 1 for r in rows]


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end"])
def test_truncation_is_named_and_counted(tmp_path, truncation):
    rows = records(60)
    rows[7]["prompt"] = "question " * 40  # its completion lies beyond the sequence
    tokenizer, limit = tiny_tokenizer(), 40
    made = built(file_of(tmp_path / "a.jsonl", rows), sequence_length=limit, truncation=truncation)
    kept = []
    for tokens, targets, weights, _ in expected_segments(rows, tokenizer):
        if len(tokens) > limit and truncation == "drop":
            continue
        cut = slice(-limit, None) if truncation == "keep_end" else slice(0, limit)
        weights = (*weights[cut][:-1], 0.0)
        if any(weights):
            targets = (*targets[cut][:-1], tokenizer.pad_id)
            kept.append((tokens[cut], targets, weights, tuple(range(len(tokens[cut])))))
    assert segments(epoch_of(made)) == sorted(kept)
    over = sum(length > limit for length in lengths_of(rows))
    assert over > 5
    assert made.counts["dropped"] == 60 - len(kept) == {"drop": over, "keep_start": 1, "keep_end": 0}[truncation]
    assert made.counts["truncated"] == {"drop": 0, "keep_start": over - 1, "keep_end": over}[truncation]
    assert made.counts["targets"] == sum(np.count_nonzero(weights) for _, _, weights, _ in kept)


def test_an_overlong_example_says_where_it_is_and_what_to_do(tmp_path):
    rows = records(20)
    rows[11]["prompt"] = "question " * 80
    path = file_of(tmp_path / "a.jsonl", rows)
    length = lengths_of(rows)[11]
    with pytest.raises(LuthierError) as error:
        built(path, sequence_length=length - 1)
    assert str(error.value).startswith(f"{path}:12: the example has {length} tokens (")
    assert str(error.value).endswith(
        "Raise stage.sequence_length, or set data.truncation to drop, keep_start or keep_end."
    )
    built(path, sequence_length=length)
    with pytest.raises(LuthierError, match="truncation='keep_start' leaves no example with a target"):
        built(file_of(tmp_path / "b.jsonl", rows[11:12]), sequence_length=32, truncation="keep_start")


def test_limit_takes_the_first_records(tmp_path):
    rows = records(20)
    made = built(file_of(tmp_path / "a.jsonl", rows), limit=6)
    assert segments(epoch_of(made)) == expected_segments(rows[:6], tiny_tokenizer())


def left_behind(tmp_path):
    """How many caches, whole or partial, are there."""
    return sum(path.is_dir() for path in (tmp_path / "cache").glob("tokens/*"))


BAD = [
    ('{"prompt": "a", "completion"}', {}, r"a\.jsonl:17: broken JSON"),
    ('{"prompt": "a"}', {}, r"a\.jsonl:17: no field 'completion'"),
    ('{"prompt": "a", "completion": ""}', {}, r"a\.jsonl:17: 'completion' is empty"),
    ('{"prompt": "' + "a " * 300 + '", "completion": "b"}', {}, r"a\.jsonl:17: the example has \d+ tokens"),
    ("{}", {"truncation": "cut"}, r"data\.truncation: unknown value 'cut'\. Known: drop, error"),
    ("{}", {"train_on": "complete"}, r"data\.train_on: unknown value 'complete'\. Did you mean 'completion'"),
    ("{}", {"rate": 0.0}, r"data\.rate: rate is 0\.0, expected a positive number"),
    ("{}", {"limit": 0}, r"data\.limit: limit is 0"),
    ("{}", {"format": "alpacca"}, r"data\.format: unknown format 'alpacca'\. Did you mean 'alpaca'"),
]


@pytest.mark.parametrize("line,options,message", BAD)
def test_bad_data_is_one_clear_line_and_leaves_nothing_behind(tmp_path, line, options, message):
    path = file_of(tmp_path / "a.jsonl", records(16))
    with open(path, "a") as file:
        file.write(line + "\n" + json.dumps(records(1)[0]))
    with pytest.raises(LuthierError, match=message) as error:
        built(path, **options)
    assert "\n" not in str(error.value)
    assert left_behind(tmp_path) == ("too long" in str(error.value))  # tokens are good for another length


def test_an_evil_template_is_an_error(tmp_path):
    path = file_of(tmp_path / "a.jsonl", [{"messages": chat_cases.CONVERSATIONS["single"]}])
    tokenizer = tiny_tokenizer(chat_template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(LuthierError, match=r"a\.jsonl:1: the chat template reaches for Python internals"):
        built(path, tokenizer=tokenizer)


def counted(monkeypatch):
    """Counts how often a source is tokenised."""
    calls = []
    real = batches._tokenised
    monkeypatch.setattr(batches, "_tokenised", lambda *args: calls.append(args) or real(*args))
    return calls


def test_the_cache_is_found_again_and_its_key_knows_everything(tmp_path, monkeypatch):
    rows = [{"messages": chat_cases.CONVERSATIONS["single"]}] * 3
    path = file_of(tmp_path / "a.jsonl", rows)
    calls = counted(monkeypatch)
    template = chat_cases.source("smollm2")
    first = built(path, tokenizer=tiny_tokenizer(chat_template=template))
    again = built(path, tokenizer=tiny_tokenizer(chat_template=template), sequence_length=128, seed=3)
    assert len(calls) == 1 and again.fingerprint != first.fingerprint
    file_of(tmp_path / "b.jsonl", rows)
    built(str(tmp_path / "b.jsonl"), tokenizer=tiny_tokenizer(chat_template=template))
    assert len(calls) == 1  # the same content elsewhere
    others = [
        lambda: built(file_of(tmp_path / "c.jsonl", rows[:2]), tokenizer=tiny_tokenizer(chat_template=template)),
        lambda: built(path, tokenizer=tiny_tokenizer(chat_template=template), train_on="all"),
        lambda: built(path, tokenizer=tiny_tokenizer(chat_template=template + " ")),
        lambda: built(path, tokenizer=tiny_tokenizer(adds="bos", chat_template=template)),
        lambda: built(path, tokenizer=tiny_tokenizer(chat_template=template), roles={"assistant": "assistant"}),
        lambda: built(path, tokenizer=tiny_tokenizer(chat_template=template), limit=1),
        lambda: built(path, tokenizer=tiny_tokenizer(chat_template=template), template=template + "  "),
    ]
    prints = {first.fingerprint, *(make().fingerprint for make in others)}
    assert len(calls) == 1 + len(others) and len(prints) == len(calls)


def truncate(folder):
    os.truncate(folder / "ids.bin", 40)


def other_key(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "key": "x"}))


@pytest.mark.parametrize(
    "damage,message",
    [
        (truncate, "is truncated"),
        (other_key, "is of other data"),
        (lambda folder: (folder / "meta.json").unlink(), "is incomplete"),
        (lambda folder: (folder / "meta.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "roles.bin").unlink(), "is damaged"),
    ],
)
def test_a_damaged_cache_is_built_again_with_a_notice(tmp_path, monkeypatch, caplog, damage, message):
    path = file_of(tmp_path / "a.jsonl", records(20))
    calls = counted(monkeypatch)
    expected = built(path).rows(0)
    (folder,) = [f for f in (tmp_path / "cache" / "tokens").iterdir() if f.is_dir()]
    damage(folder)
    with caplog.at_level(logging.WARNING, "luthier"):
        assert same(built(path).rows(0), expected)
    assert len(calls) == 2 and message in caplog.text and "building it again" in caplog.text
    built(path)
    assert len(calls) == 2


def test_a_cache_that_is_cut_while_in_use_is_said(tmp_path):
    made = built(file_of(tmp_path / "a.jsonl", records(20)))
    (folder,) = [f for f in (tmp_path / "cache" / "tokens").iterdir() if f.is_dir()]
    truncate(folder)
    with pytest.raises(LuthierError, match="the token cache was cut while in use. Start again"):
        epoch_of(made)


def test_a_cache_in_a_bucket_is_shared_by_machines(tmp_path, monkeypatch, caplog):
    calls = counted(monkeypatch)
    (tmp_path / "disk").mkdir()
    file_of(tmp_path / "disk" / "a.jsonl", records(20))
    with tiny_bucket.bucket(tmp_path / "disk"):
        found = []
        for machine in "abc":
            monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / machine))
            section = config.data("gs://bucket/a.jsonl")
            made = batches.build(
                section,
                tokenizer=tiny_tokenizer(),
                sequence_length=64,
                batch_size=4,
                seed=0,
                cache_dir="gs://bucket/cache",
            )
            found.append(made.rows(0))
            if machine == "b":
                (folder,) = (tmp_path / "disk" / "cache" / "tokens").iterdir()
                truncate(folder)
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert len(calls) == 2 and "gs://bucket" in caplog.text and "is truncated; building it again" in caplog.text
    assert os.path.getsize(folder / "ids.bin") > 40


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    path = file_of(tmp_path / "a.jsonl", records(20))
    monkeypatch.setattr(cache, "_write_meta", full)
    with pytest.raises(LuthierError, match="the token cache: the disk is full. Free some space or set LUTHIER_CACHE"):
        built(path)
    assert not left_behind(tmp_path)


def test_what_a_killed_process_left_is_cleared(tmp_path, monkeypatch):
    path = file_of(tmp_path / "a.jsonl", records(20))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.shutil, "rmtree", lambda *args, **kwargs: None)  # kill -9: nothing is tidied up
        patch.setattr(cache, "_write_meta", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        built(path)
    assert left_behind(tmp_path) == 1
    built(path)
    assert left_behind(tmp_path) == 1 and not list((tmp_path / "cache" / "tokens").glob("*.partial"))


def test_notices_say_what_was_done(tmp_path, caplog):
    rows = [{"prompt": "The answer i", "completion": "s blue"}, {"prompt": "q", "completion": " deep" * 90}]
    with caplog.at_level(logging.WARNING, "luthier"):
        built(file_of(tmp_path / "a.jsonl", rows), truncation="keep_start")
    for part in ("1 of 2 examples were cut to 64 tokens", "1 of 2 examples have a prompt whose tokens change"):
        assert part in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "luthier"):
        built(file_of(tmp_path / "a.jsonl", rows), truncation="drop")
        built(file_of(tmp_path / "b.jsonl", [{"input_ids": [5, 6, 7]}]))
    for part in ("1 examples dropped: longer than 64", "1 of 1 examples have no end-of-text token among their targets"):
        assert part in caplog.text


def test_processes_that_start_together_build_once(tmp_path, monkeypatch):
    path = file_of(tmp_path / "a.jsonl", records(600))
    calls, found = counted(monkeypatch), []
    threads = [threading.Thread(target=lambda: found.append(built(path).rows(0))) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(calls) == 1 and len(found) == 4 and all(same(found[0], rows) for rows in found)


def test_preview_shows_what_is_trained(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=chat_cases.source("smollm2"))
    path = file_of(
        tmp_path / "a.jsonl", [{"messages": [chat_cases.user("[b]How[/b]"), chat_cases.assistant("many")]}] * 3
    )
    made = built(path, tokenizer=tokenizer)
    examples = made.preview(2)
    assert len(examples) == 2
    assert "".join(text for text, _, weight in examples[0] if weight) == "many<|im_end|>"
    assert "".join(text for text, role, _ in examples[0] if role == "user") == "[b]How[/b]"
    import rich.console

    console = rich.console.Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(batches.preview_table(made, 1))
    text = console.export_text()
    assert "<|im_end|>" in text and "assistant" in text and "[" in text


def test_prefetch_is_in_order_ahead_and_raises(tmp_path):
    started = []

    def make(step):
        started.append(step)
        if step == 9:
            raise LuthierError("step nine")
        return step * step

    ahead = batches.prefetch(make, 5, depth=3)
    assert [next(ahead) for _ in range(4)] == [(5, 25), (6, 36), (7, 49), (8, 64)]
    assert max(started) <= 11
    with pytest.raises(LuthierError, match="step nine"):
        next(ahead)
    before = threading.active_count()
    other = batches.prefetch(lambda step: step, 0, depth=2)
    next(other)
    other.close()
    assert threading.active_count() <= before


def test_memory_stays_flat(tmp_path):
    """A source that would be 2 GB of records leaves no list of them behind: chunks are written as they come."""

    class Endless:
        fingerprint, alive, most = "endless", 0, 0

        def __len__(self):
            return 6000

        def __getitem__(self, index):
            return {"prompt": f"{index}", "completion": " the sky"}

        def where(self, index):
            return f"x:{index}"

    real = sources.open_source
    batches.open_source = lambda *args, **kwargs: Endless()
    try:
        import tracemalloc

        tracemalloc.start()
        made = built("x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    finally:
        batches.open_source = real
    assert made.counts["examples"] == 6000
    assert peak < 12e6
    epoch_of(made)
    with open("/proc/self/maps") as maps:  # pages of a map would be memory of this process, in the end all of them
        assert str(tmp_path) not in maps.read()
