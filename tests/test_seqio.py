"""SeqIO tasks and mixtures against SeqIO's own feature converters; vocabularies in both directions."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_text import tiny_tokenizer

from luthier import config
from luthier.data import batches, seqio_tasks, sources, vocabulary
from luthier.errors import LuthierError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

REGISTRY = str(pathlib.Path(__file__).with_name("seqio_registry.py"))
SENTENCEPIECE = os.path.join(os.path.dirname(seqio.__file__), "test_data", "sentencepiece", "sentencepiece.model")


def named(task):
    return f"seqio:{REGISTRY}#{task}"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def build(task, cache_dir, *, tokenizer=None, batch_size=4, packing="none", **options):
    return batches.build(
        config.data(named(task), **options),
        tokenizer=tokenizer or tiny_tokenizer(),
        sequence_length=48,
        batch_size=batch_size,
        seed=5,
        packing=packing,
        cache_dir=cache_dir,
    )


def epoch(built):
    """One epoch's rows: the batch has as many rows as the epoch."""
    assert built.batch_size == built.rows_per_epoch
    return built.rows(0)


def converted(task, split, converter):
    """What SeqIO feeds a decoder: {(tokens, targets, weights)} of each example, BOS and padding cut off."""
    lengths = dict.fromkeys(seqio.get_mixture_or_task(task).output_features, 24)
    dataset = seqio.get_dataset(task, lengths, feature_converter=converter, dataset_split=split, shuffle=False)
    found = set()
    for example in dataset.as_numpy_iterator():
        stop = int(np.count_nonzero(example["decoder_target_tokens"]))
        keys = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
        found.add(tuple(tuple(example[key][1:stop].tolist()) for key in keys))
    return found


@pytest.mark.parametrize(
    ("task", "split", "train_on", "converter"),
    [
        ("copy", "train", "completion", lambda: seqio.PrefixLMFeatureConverter(pack=False)),
        ("copy", "validation", "completion", lambda: seqio.PrefixLMFeatureConverter(pack=False)),
        ("copy", "train", "all", lambda: seqio.PrefixLMFeatureConverter(pack=False, loss_on_targets_only=False)),
        ("no_inputs", "train", "completion", lambda: seqio.LMFeatureConverter(pack=False)),
        ("copy:of:colons", "train", "completion", lambda: seqio.PrefixLMFeatureConverter(pack=False)),
    ],
)
def test_examples_are_those_of_the_feature_converter(task, split, train_on, converter, cache_dir):
    source = f"{task}:{split}"
    size = len(sources.open_source(named(source), cache_dir=cache_dir))
    rows = epoch(build(source, cache_dir, batch_size=size, train_on=train_on))
    ours = set()
    for i in range(size):
        stop = int(np.count_nonzero(rows["segment_ids"][i])) - 1  # the last token predicts nothing
        keys = ("tokens", "targets", "loss_weights")
        ours.add(tuple(tuple(rows[key][i, :stop].astype(int).tolist()) for key in keys))
        assert not rows["loss_weights"][i, stop:].any()
    theirs = converted(task, split, converter())
    assert len(theirs) == size
    assert ours == theirs


@pytest.mark.parametrize("task", ["copy", "mixed"])
def test_two_builds_and_two_halves_are_equal(task, tmp_path):
    built = [build(task, tmp_path / str(i), packing="best_fit") for i in range(2)]
    assert built[0].fingerprint == built[1].fingerprint
    for step in range(8):
        whole, halves = built[0].rows(step), [built[1].rows(step, 0, 2), built[1].rows(step, 2, 4)]
        for key, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([half[key] for half in halves]), err_msg=key)


@pytest.mark.parametrize("mixture", ["mixed", "nested", "by_size"])
def test_rates_are_those_of_the_mixture(mixture, cache_dir):
    found = seqio_tasks.parts(named(mixture), cache_dir=cache_dir)
    provider = seqio.get_mixture_or_task(mixture)
    rates = {task.name: provider.get_rate(task) for task in provider.tasks}
    expected = {name: rate / sum(rates.values()) for name, rate in rates.items() if rate}
    assert {part.source.split("#")[1].split(":")[0]: part.rate for part in found} == pytest.approx(expected)
    built = build(mixture, cache_dir, rate=7.0)
    assert sum(part.rate for part in built.parts) == pytest.approx(7.0)


def test_a_mixture_draws_at_its_rates(cache_dir):
    rows = epoch(build("mixed", cache_dir, batch_size=25))  # copy has 20 examples and rate 3, small 5 and rate 1
    texts = [seqio.ByteVocabulary().decode(row.tolist()) for row in rows["tokens"]]
    drawn = {name: sum(text.startswith(f"{name} train") for text in texts) for name in ("copy", "small", "tiny")}
    assert drawn == {"copy": 19, "small": 6, "tiny": 0}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("#draws", "random or keeps state"),
        ("#draws_seeded", "random or keeps state"),
        ("#counts", "random or keeps state"),
        ("#grows", "random or keeps state"),
        ("#breaks", "task 'breaks' fails (InvalidArgumentError"),
        ("#empty_targets", "'targets' is empty"),
        ("#text", "'inputs' is text, expected a list of token ids"),
        ("#two_vocabularies", "one vocabulary for inputs and another for targets"),
        ("#copi", "no task or mixture 'copi' is registered. Did you mean 'copy'"),
        ("#copy:trian", "'copy' has no split 'trian'. Did you mean 'train'?"),
        ("#mixed:test", "'mixed' has no split 'test'"),
        ("#mixed", "this is a mixture, expected one task"),
        ("#", "no task or mixture is named"),
    ],
)
def test_mistakes(source, message, cache_dir):
    with pytest.raises(LuthierError) as error:
        sources.open_source(f"seqio:{REGISTRY}{source}", cache_dir=cache_dir)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(pathlib.Path(cache_dir).rglob("*.partial"))


def test_a_module_that_is_missing_or_broken_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    for module, message in (
        ("no.such.module", "no module"),
        ("absent.py", "no file"),
        (f"{tmp_path}/broken.py", "ZeroDivisionError"),
    ):
        with pytest.raises(LuthierError, match=message):
            sources.open_source(f"seqio:{module}#copy", cache_dir=tmp_path)


def test_ids_beyond_the_models_vocabulary_are_an_error(cache_dir):
    (task,) = seqio_tasks.parts(named("copy"), cache_dir=cache_dir)

    class Model:
        fingerprint, vocab_size, eos_id = "other", task.largest_id + 1, 1

    assert "ByteVocabulary" in seqio_tasks.check_vocabulary(task, Model)
    Model.vocab_size -= 1
    with pytest.raises(LuthierError, match=f"token id {task.largest_id} of ByteVocabulary"):
        seqio_tasks.check_vocabulary(task, Model)


def test_a_build_is_kept_until_what_it_was_made_from_changes(tmp_path, monkeypatch):
    digits, module = tmp_path / "digits.txt", tmp_path / "tasks.py"
    digits.write_text("one\ntwo\n")
    monkeypatch.setenv("DIGITS", str(digits))
    text = pathlib.Path(REGISTRY).read_text()
    module.write_text(
        text[: text.index('add("copy")')] + text[text.index('if "DIGITS"') :].replace('"lines"', '"lines_kept"')
    )
    built = []
    write = seqio_tasks._write_twice
    monkeypatch.setattr(seqio_tasks, "_write_twice", lambda *args: built.append(1) or write(*args))

    def fingerprint():
        return sources.open_source(f"seqio:{module}#lines_kept", cache_dir=tmp_path / "cache").fingerprint

    first = fingerprint()
    assert (fingerprint(), len(built)) == (first, 1)
    digits.write_text("one\ntwo\nthree\n")
    assert fingerprint() != first
    assert len(built) == 2
    module.write_text(module.read_text() + "\n# another version")
    fingerprint()
    assert len(built) == 3


def test_reading_a_build_imports_no_tensorflow(tmp_path):
    size = len(sources.open_source(named("copy"), cache_dir=tmp_path))
    code = (
        "import sys; from luthier.data import batches, seqio_tasks, sources, vocabulary\n"
        f"source = sources.open_source({named('copy')!r}, cache_dir={str(tmp_path)!r})\n"
        f"assert len(source) == {size} and source[0]\n"
        "sys.exit('tensorflow' in sys.modules or 'seqio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


TEXTS = ["What is 2 + 3?", "größe ✓", "", "The sky<|endoftext|>is blue", "poem about the sea.\n\n"]


@pytest.mark.parametrize("unk", [None, "<bos>"])
def test_hf_vocabulary_keeps_seqios_contract(unk):
    config_ = {
        "eos_token": "<|im_end|>",
        "bos_token": "<s>",
        "pad_token": "<eos>",
        **({"unk_token": unk} if unk else {}),
    }
    tokenizer = tiny_tokenizer(**config_)
    vocab = vocabulary.HFVocabulary(tokenizer)
    assert isinstance(vocab, seqio.Vocabulary)
    assert vocab == vocabulary.HFVocabulary(tiny_tokenizer(**config_)) != vocabulary.HFVocabulary(tiny_tokenizer())
    assert (vocab.vocab_size, vocab.extra_ids) == (tokenizer.vocab_size, 0)
    ids = {name: tokenizer.id_of(token) for name, token in config_.items()}
    assert (vocab.eos_id, vocab.bos_id, vocab.pad_id, vocab.unk_id) == (
        ids["eos_token"], ids["bos_token"], ids["pad_token"], ids.get("unk_token"),
    )  # fmt: skip
    eos, beyond = vocab.eos_id, vocab.vocab_size + 3
    for text in TEXTS:
        found = vocab.encode(text)
        assert found == tokenizer._backend.encode(text, add_special_tokens=False).ids
        assert vocab.encode_tf(tf.constant(text)).numpy().tolist() == found
        shown = text.replace("<|endoftext|>", "")
        # The contract of seqio.Vocabulary.decode: up through the first EOS, unknown ids to UNK.
        for tail in ([], [eos], [eos, found[0] if found else eos, eos], *([[beyond, eos]] if unk else [])):
            assert vocab.decode(found + tail) == shown
            assert vocab.decode_tf(tf.constant(found + tail, tf.int32)).numpy().decode() == shown


def test_hf_vocabulary_takes_tensors_of_any_rank():
    vocab = vocabulary.HFVocabulary(tiny_tokenizer())
    texts = np.array(TEXTS[:4])
    flat = vocab.encode_tf(tf.constant(texts))
    assert flat.to_list() == [vocab.encode(text) for text in texts]
    square = vocab.encode_tf(tf.constant(texts.reshape(2, 2)))
    assert square.to_list() == [[vocab.encode(text) for text in row] for row in texts.reshape(2, 2)]
    ids = flat.to_tensor(vocab.pad_id)
    assert [text.decode() for text in vocab.decode_tf(ids).numpy()] == [
        text.replace("<|endoftext|>", "") for text in texts
    ]


def test_a_task_over_hf_vocabulary_is_our_own_pipeline(tmp_path):
    tokenizer = tiny_tokenizer()
    feature = seqio.Feature(vocabulary.HFVocabulary(tokenizer))
    rows = [{"prompt": f"Question: {i}?", "completion": f" The answer is {i}."} for i in range(9)]

    def dataset(split, shuffle_files, seed=None):
        columns = {"inputs": [r["prompt"] for r in rows], "targets": [r["completion"] for r in rows]}
        return tf.data.Dataset.from_tensor_slices(columns)

    seqio.TaskRegistry.add(
        "over_hf",
        source=seqio.FunctionDataSource(dataset, splits=("train",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": seqio.Feature(feature.vocabulary, add_eos=False), "targets": feature},
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [
        batches.build(
            config.data(source), tokenizer=tokenizer, sequence_length=64, batch_size=3, seed=1, cache_dir=tmp_path
        )
        for source in ("seqio:over_hf", str(tmp_path / "rows.jsonl"))
    ]
    for step in range(4):
        for key, value in made[0].rows(step).items():
            np.testing.assert_array_equal(value, made[1].rows(step)[key], err_msg=key)
    (task,) = seqio_tasks.parts("seqio:over_hf", cache_dir=tmp_path)
    assert seqio_tasks.check_vocabulary(task, tokenizer) is None


@pytest.mark.parametrize("extra_ids", [0, 3])
def test_a_sentencepiece_vocabulary_as_our_tokenizer(extra_ids, tmp_path):
    vocab = seqio.SentencePieceVocabulary(SENTENCEPIECE, extra_ids=extra_ids)
    tokenizer = vocabulary.SentencePieceTokenizer(vocab)
    same = vocabulary.SentencePieceTokenizer(seqio.SentencePieceVocabulary(SENTENCEPIECE, extra_ids=extra_ids))
    assert tokenizer.fingerprint == same.fingerprint
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (vocab.vocab_size, vocab.eos_id, vocab.pad_id)
    for text in ("this is a test", "this is <extra_id_1> test" if extra_ids else "that", "thís ✓  was"):
        ids = tokenizer.encode(text)
        assert ids == list(vocab.encode(text)) == vocab.encode_tf(tf.constant(text)).numpy().tolist()
        assert tokenizer.decode(ids) == vocab.decode(ids)
        ((offset_ids, offsets),) = tokenizer.encode_with_offsets([text])
        assert offset_ids == ids
        covered = [text[start:end].strip() for start, end in offsets]
        known = [i != vocab.unk_id for i in ids]
        pieces = [tokenizer.token(i).replace("▁", " ").strip() for i in ids]
        assert [c for c, k in zip(covered, known) if k] == [p for p, k in zip(pieces, known) if k]
        assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
        assert [tokenizer.id_of(tokenizer.token(i)) for i in ids] == ids
    assert tokenizer.id_of("no such piece") is None

    (tmp_path / "rows.jsonl").write_text('{"prompt": "this is", "completion": " a test"}\n')
    section = config.data(str(tmp_path / "rows.jsonl"))
    built = batches.build(section, tokenizer=tokenizer, sequence_length=32, batch_size=1, seed=0, cache_dir=tmp_path)
    rows = built.rows(0)
    whole = [
        *([tokenizer.bos_id] if tokenizer.bos_id is not None else []),
        *vocab.encode("this is a test"),
        vocab.eos_id,
    ]
    assert rows["tokens"][0, : len(whole)].tolist() == whole
    targets = rows["targets"][0][rows["loss_weights"][0] > 0].tolist()
    assert targets == [*vocab.encode("a test"), vocab.eos_id]


def test_a_build_can_be_taken_elsewhere(tmp_path, monkeypatch):
    here = sources.open_source(named("small"), cache_dir=tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.setattr(seqio_tasks, "import_seqio", lambda where: pytest.fail("built again"))
    assert sources.open_source(named("small"), cache_dir=tmp_path / "there").fingerprint == here.fingerprint
