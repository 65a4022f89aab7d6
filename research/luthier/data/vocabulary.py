"""Both ways between SeqIO vocabularies and our tokenizers.

`HFVocabulary` is a `seqio.Vocabulary` over a `Tokenizer`, so that SeqIO tasks can be written for
the models here. `SentencePieceTokenizer` is a tokenizer over a `seqio.SentencePieceVocabulary`, so
that such a vocabulary can drive our pipeline. seqio is imported when `HFVocabulary` is first used.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from luthier.data.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name == "HFVocabulary":
        return _hf_vocabulary()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _hf_vocabulary() -> type:
    """The class `HFVocabulary`, made when it is first asked for: its base is TensorFlow's."""
    from luthier.data.seqio_tasks import import_seqio

    seqio = import_seqio("HFVocabulary")
    import tensorflow as tf

    class HFVocabulary(seqio.Vocabulary):
        """A SeqIO vocabulary over a tokenizer: `seqio.Feature(HFVocabulary(tokenizer))`.

        Encoding adds nothing; `add_eos` of the feature and SeqIO's `append_eos` do that. Decoding
        stops after the first EOS and leaves special tokens out, as SentencePiece does. Inside a
        `tf.data` pipeline the tokenizer runs in Python.

        SeqIO holds id 0 to be padding. Here 0 may be a token like any other (in SmolLM2 it is EOS),
        so `pad_id` is the tokenizer's own; only SeqIO's feature converters, which are not used
        here, would take 0 for padding.

        Args:
          tokenizer: any of ours.
        """

        def __init__(self, tokenizer: Tokenizer):
            super().__init__(extra_ids=0)
            self._tokenizer = tokenizer
            unknown = tokenizer.special_tokens.get("unk_token")
            self._unk_id = tokenizer.id_of(unknown) if unknown else None

        @property
        def fingerprint(self) -> str:
            return self._tokenizer.fingerprint

        @property
        def bos_id(self) -> int | None:
            return self._tokenizer.bos_id

        @property
        def eos_id(self) -> int | None:
            return self._tokenizer.eos_id

        @property
        def pad_id(self) -> int:
            return seqio.vocabularies.PAD_ID if self._tokenizer.pad_id is None else self._tokenizer.pad_id

        @property
        def unk_id(self) -> int | None:
            return self._unk_id

        @property
        def _base_vocab_size(self) -> int:
            return self._tokenizer.vocab_size

        def _encode(self, s: str | bytes) -> Sequence[int]:
            return self._tokenizer.encode(tf.compat.as_text(s))

        def _decode(self, ids: Sequence[int]) -> str:
            return self._tokenizer.decode(ids, skip_special=True)

        def _encode_tf(self, s):
            """Text of any rank to ids with one more dimension, ragged unless `s` is a scalar."""
            s = s if isinstance(s, tf.RaggedTensor) else tf.convert_to_tensor(s)
            rank = s.shape.rank or 0  # what py_function leaves unknown is one text
            if rank > 1:
                ragged = s if isinstance(s, tf.RaggedTensor) else tf.RaggedTensor.from_tensor(s, ragged_rank=rank - 1)
                return tf.ragged.map_flat_values(self._encode_tf, ragged)
            flat = tf.reshape(s, [-1])
            ids, lengths = tf.numpy_function(self._encode_all, [flat], (tf.int32, tf.int64), stateful=False)
            ids.set_shape([None])
            lengths.set_shape([None])
            return ids if rank == 0 else tf.RaggedTensor.from_row_lengths(ids, lengths)

        def _encode_all(self, texts):
            import numpy as np

            rows = self._tokenizer.encode_batch([text.decode() for text in texts])
            return np.asarray(sum(rows, []), np.int32), np.asarray([len(row) for row in rows], np.int64)

        def _decode_tf(self, ids):
            """Ids [n] to a scalar text, [m, n] to [m] texts."""
            rows = tf.reshape(ids, [-1, tf.shape(ids)[-1]])
            texts = tf.numpy_function(self._decode_all, [rows], tf.string, stateful=False)
            texts = tf.reshape(texts, tf.shape(ids)[:-1])
            texts.set_shape(ids.shape[:-1])
            return texts

        def _decode_all(self, rows):
            import numpy as np

            return np.asarray([self._decode(row).encode() for row in rows.tolist()], object)

        def __eq__(self, other) -> bool:
            return isinstance(other, HFVocabulary) and self.fingerprint == other.fingerprint

        def __hash__(self) -> int:
            return hash(self.fingerprint)

        def __str__(self) -> str:
            return f"HFVocabulary({self.vocab_size} ids, sha256 {self.fingerprint[:12]})"

    return HFVocabulary


class SentencePieceTokenizer:
    """A tokenizer over a `seqio.SentencePieceVocabulary`, with what `luthier.data` asks of a `Tokenizer`.

    Ids are the vocabulary's, extra ids included. As SentencePiece has it, text that spells a special
    token out is text: a chat template cannot write one.

    Attributes:
      files: `tokenizer.model`, the SentencePiece model as the vocabulary uses it.
      fingerprint: sha256 of that model.
      bos_id, eos_id, pad_id: token ids, or None where the model has none.

    Args:
      vocabulary: the vocabulary.
      chat_template: source of a Jinja template.
    """

    def __init__(self, vocabulary: Any, *, chat_template: str | None = None):
        self._vocabulary = vocabulary
        self._processor = vocabulary.tokenizer
        self.files = {"tokenizer.model": vocabulary.sp_model}
        self.fingerprint = hashlib.sha256(vocabulary.sp_model).hexdigest()
        self.chat_template = chat_template
        ids = {name: getattr(self._processor, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        present = {name: token_id for name, token_id in ids.items() if token_id >= 0}
        self.bos_id, self.eos_id = present.get("bos"), present.get("eos")
        self.pad_id = present.get("pad", self.eos_id)
        self.eos_ids = () if self.eos_id is None else (self.eos_id,)
        self.special_tokens = {f"{name}_token": self.token(token_id) for name, token_id in present.items()}
        self.vocab_size = int(vocabulary.vocab_size)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; with `special` after BOS, if the model has one."""
        begin = [self.bos_id] if special and self.bos_id is not None else []
        return [*begin, *self._vocabulary.encode(text)]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of many texts."""
        return [self.encode(text, special=special) for text in texts]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids of many texts and the characters (start, end) that each token covers."""
        result = []
        for text in texts:
            pieces = self._processor.encode(text, out_type="proto").pieces
            ends = list(itertools.accumulate((len(piece.surface) for piece in pieces), initial=0))
            result.append(([piece.id for piece in pieces], list(itertools.pairwise(ends))))
        return result

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids. SentencePiece writes nothing for special tokens, whatever `skip_special` says."""
        return self._processor.decode([int(i) for i in ids])

    def token(self, token_id: int) -> str | None:
        """The vocabulary's piece."""
        return self._processor.id_to_piece(int(token_id)) if 0 <= token_id < self._processor.get_piece_size() else None

    def id_of(self, token: str) -> int | None:
        """The id of a whole piece."""
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None
