"""TFDS datasets, prepared here by their own builders, against what TFDS itself reads."""

import subprocess
import sys

import numpy as np
import pytest
from tiny_text import tiny_tokenizer

from luthier import config
from luthier.data import batches, sources, tfds_builders
from luthier.errors import LuthierError

tfds = pytest.importorskip("tensorflow_datasets")

SPLITS = {"train": 23, "test": 5}


def record(split, i):
    """The i-th example as its builder yields it."""
    return {
        "question": f"{split}: what is {i} + 3? größe",
        "answer": str(i + 3),
        "score": np.int32(i),
        "verdict": i % 2,
        "words": [f"w{j}" for j in range(i % 3)],
        "chat": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i + 3}."}],
    }


class LuthierTiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "score": tfds.features.Scalar(np.int32),
            "verdict": tfds.features.ClassLabel(names=["even", "odd"]),
            "words": tfds.features.Sequence(tfds.features.Text()),
            "chat": tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, size) for split, size in SPLITS.items()}

    def _generate_examples(self, split, size):
        yield from ((i, record(split, i)) for i in range(size))


def prepare(folder, file_format, shards=1):
    if file_format == "tfrecord":
        pytest.importorskip("tensorflow")
    builder = LuthierTiny(data_dir=folder, file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    return builder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return folder, prepare(folder, "array_record", shards=3)


def as_written(item):
    """What a builder yielded, with the label by name and NumPy scalars as numbers."""
    return {**item, "score": int(item["score"]), "verdict": ["even", "odd"][item["verdict"]]}


@pytest.mark.parametrize("file_format", ["array_record", "parquet", "tfrecord"])
def test_records_are_what_the_builder_yielded(file_format, tmp_path, monkeypatch):
    builder = prepare(tmp_path, file_format, shards=3)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for split, size in SPLITS.items():
        for name in (
            f"tfds:luthier_tiny:{split}",
            f"tfds:luthier_tiny:1.0.0:{split}",
            f"tfds:{builder.data_path}:{split}",
        ):
            source = sources.open_source(name)
            assert len(source) == size
            found = sorted((source[i] for i in range(size)), key=lambda item: item["score"])
            assert found == [as_written(record(split, i)) for i in range(size)]


@pytest.fixture(scope="module")
def prepared_tfrecord(tmp_path_factory):
    builder = prepare(tmp_path_factory.mktemp("tfrecord"), "tfrecord", shards=3)
    assert len(list(builder.data_path.glob("*train.tfrecord*"))) == 3
    return builder


@pytest.mark.parametrize("split", ["train", "train[3:11]", "train[50%:]", "train[:4]+test"])
def test_the_order_is_that_of_tfds(split, prepared_tfrecord):
    source = tfds_builders.open_source(f"tfds:{prepared_tfrecord.data_path}:{split}")
    read = tfds.ReadConfig(interleave_cycle_length=1)
    theirs = prepared_tfrecord.as_dataset(split=split, read_config=read).as_numpy_iterator()
    assert [source[i]["question"] for i in range(len(source))] == [item["question"].decode() for item in theirs]


def test_the_fingerprint_is_of_the_content(prepared, tmp_path):
    _, builder = prepared
    opened = lambda split, at=builder: tfds_builders.open_source(f"tfds:{at.data_path}:{split}").fingerprint  # noqa: E731
    assert opened("train") == opened("train")
    assert (
        len({opened("train"), opened("test"), opened("train[:5]"), opened("train", prepare(tmp_path, "parquet"))}) == 4
    )


def test_two_halves_of_a_batch_are_the_whole(prepared, tmp_path):
    _, builder = prepared
    section = config.data(f"tfds:{builder.data_path}:train", columns={"prompt": "question", "completion": "verdict"})
    built = [
        batches.build(
            section, tokenizer=tiny_tokenizer(), sequence_length=64, batch_size=4, seed=3, cache_dir=tmp_path / str(i)
        )
        for i in range(2)
    ]
    assert built[0].counts["examples"] == 23
    assert built[0].fingerprint == built[1].fingerprint
    for step in range(6):
        whole, halves = built[0].rows(step), [built[1].rows(step, 0, 2), built[1].rows(step, 2, 4)]
        for key, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([half[key] for half in halves]), err_msg=key)


def test_a_conversation_is_a_conversation(prepared, tmp_path):
    _, builder = prepared
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    section = config.data(f"tfds:{builder.data_path}:test", columns={"messages": "chat"})
    built = batches.build(section, tokenizer=tokenizer, sequence_length=64, batch_size=1, seed=0, cache_dir=tmp_path)
    trained = ["".join(text for text, _, weight in example if weight) for example in built.preview(5)]
    assert {text.removesuffix("<|im_end|>") for text in trained} == {f"{i + 3}." for i in range(5)}


def test_reading_imports_no_tensorflow(prepared):
    _, builder = prepared
    code = (
        "import sys; from luthier.data import sources\n"
        f"source = sources.open_source('tfds:{builder.data_path}:train'); source[4]\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:luthier_tiny:trian", "no split 'trian'. Did you mean 'train'?"),
        ("tfds:luthier_tiny:train[:x]", "train[:x]"),
        ("tfds:luthier_tony:train", "no dataset 'luthier_tony'"),
        ("tfds:{folder}:train", "no dataset_info.json"),
        ("tfds::train", "not a TFDS name"),
        ("tfds:mnist:train", "tfds build mnist"),
    ],
)
def test_mistakes(source, message, prepared, monkeypatch):
    folder, _ = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    with pytest.raises(LuthierError) as error:
        sources.open_source(source.format(folder=folder))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_tfrecord_is_named(tmp_path):
    builder = prepare(tmp_path, "tfrecord")
    (shard,) = builder.data_path.glob("*train.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(LuthierError, match="train.tfrecord.*ends inside record 22"):
        tfds_builders.open_source(f"tfds:{builder.data_path}:train")[0]
