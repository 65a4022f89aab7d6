"""SeqIO tasks that the tests of `luthier.data.seqio_tasks` read; `DIGITS` names its text file."""

import functools
import itertools
import os

import seqio
import tensorflow as tf

BYTES = seqio.ByteVocabulary()
FEATURES = {key: seqio.Feature(BYTES, add_eos=True) for key in ("inputs", "targets")}
calls = itertools.count()


def pairs(count, split, shuffle_files, seed=None, name="task"):
    rows = [{"inputs": f"{name} {split} {i}", "targets": f"{'answer ' * (i % 3)}{i}"} for i in range(count)]
    return tf.data.Dataset.from_tensor_slices({key: [row[key] for row in rows] for key in ("inputs", "targets")})


def add(name, *extra, count=20, features=FEATURES, splits=("train", "validation"), source=None):
    seqio.TaskRegistry.add(
        name,
        source=source or seqio.FunctionDataSource(functools.partial(pairs, count, name=name), splits=splits),
        preprocessors=[*extra, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features,
    )


def changed(key, fn):
    return lambda dataset: dataset.map(lambda example: {**example, key: fn(example[key])})


def counted(text):
    number = tf.numpy_function(lambda: str(next(calls)).encode(), [], tf.string)
    return tf.strings.join([text, tf.ensure_shape(number, [])])


@seqio.map_over_dataset(num_seeds=1)
def seeded(example, seed):
    number = tf.random.stateless_uniform([], seed, maxval=10**6, dtype=tf.int32)
    return {**example, "targets": tf.strings.as_string(number)}


add("copy")
add("copy:of:colons", count=3)
add("small", count=5)
add("tiny", count=2, splits=("train",))
add("no_inputs", changed("targets", lambda text: text), features={"targets": FEATURES["targets"]})
add("draws", changed("targets", lambda text: tf.strings.as_string(tf.random.uniform([]))))
add("draws_seeded", seeded)
add("counts", changed("targets", counted))
add("grows", lambda dataset: dataset.repeat(next(calls) + 1))
add("breaks", changed("targets", lambda text: tf.strings.as_string(tf.strings.to_number(text))))
seqio.TaskRegistry.add(
    "empty_targets",
    source=seqio.FunctionDataSource(functools.partial(pairs, 4), splits=("train",)),
    preprocessors=[changed("targets", lambda text: tf.strings.substr(text, 0, 0)), seqio.preprocessors.tokenize],
    output_features=FEATURES,
)
seqio.TaskRegistry.add(
    "text",
    source=seqio.FunctionDataSource(functools.partial(pairs, 4), splits=("train",)),
    preprocessors=[],
    output_features={key: seqio.Feature(seqio.PassThroughVocabulary(9), dtype=tf.string, rank=0) for key in FEATURES},
)
seqio.TaskRegistry.add(
    "two_vocabularies",
    source=seqio.FunctionDataSource(functools.partial(pairs, 4), splits=("train",)),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={**FEATURES, "inputs": seqio.Feature(seqio.ByteVocabulary(extra_ids=7))},
)
seqio.MixtureRegistry.add("mixed", [("copy", 3), ("small", 1.0), ("tiny", 0)])
seqio.MixtureRegistry.add("nested", [("mixed", 1.0), ("tiny", 4)])
seqio.MixtureRegistry.add("by_size", ["copy", "small"], default_rate=lambda task: float(len(task.name)))
if "DIGITS" in os.environ:
    add(
        "lines",
        lambda dataset: dataset.map(lambda line: {"inputs": line, "targets": line}),
        source=seqio.TextLineDataSource({"train": os.environ["DIGITS"]}),
    )
