"""GGUF files: header, config, tokenizer and dequantised tensors under their Hugging Face names.

The `gguf` package dequantises. Its reader takes seconds over a vocabulary, builds numpy objects per
token and needs a local file, so the header is read here.
Source of the layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import collections
import json
import math
import re
import struct
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
from etils import epath

from luthier.data.tokenizer import Tokenizer
from luthier.errors import LuthierError, near
from luthier.models.config import ModelConfig
from luthier.weights.streaming import Tensors

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


class Entry(NamedTuple):
    """Where one tensor lies, with numpy's order of axes; `offset` in bytes from the start of the file."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int


class GGUF(NamedTuple):
    """The header of a file."""

    path: epath.Path
    fields: dict[str, Any]
    entries: dict[str, Entry]


def read_header(path: epath.Path) -> GGUF:
    """Metadata and tensor table of a file, without its data.

    Raises:
      LuthierError: if the file is not GGUF, is truncated, or of an unknown version.
    """
    length = path.stat().length
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LuthierError("the file is not GGUF: it does not begin with those letters", where=path)
        try:
            version, count, pairs = struct.unpack("<IQQ", file.read(20))
            if version not in _VERSIONS:
                raise LuthierError(f"GGUF version {version} (or byte order) is not supported", where=path)
            fields = {_string(file): _value(file) for _ in range(pairs)}
            table = [_tensor_row(file) for _ in range(count)]
        except (struct.error, UnicodeDecodeError, KeyError, ValueError, MemoryError, OverflowError):
            raise LuthierError("the header is truncated or damaged", where=path, mend="Download it again") from None
        start = file.tell()
    alignment = fields.get("general.alignment", 32)
    start += -start % alignment
    entries = {name: Entry(kind, shape, start + offset) for name, kind, shape, offset in table}
    end = max((e.offset + _bytes(e) for e in entries.values()), default=0)
    if end > length:
        raise LuthierError(
            f"the file is truncated: it has {length:,} bytes, its header asks for {end:,}",
            where=path,
            mend="Download it again",
        )
    return GGUF(path, fields, entries)


def _read(file: BinaryIO, form: str) -> Any:
    return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]


def _string(file: BinaryIO) -> str:
    size = _read(file, "Q")
    text = file.read(size)
    if len(text) != size:
        raise struct.error("end of file")
    return text.decode()


def _value(file: BinaryIO, kind: int | None = None) -> Any:
    kind = _read(file, "I") if kind is None else kind
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _read(file, _SCALARS[kind])
    inner, count = _read(file, "I"), _read(file, "Q")
    if inner in _SCALARS:
        data = file.read(count * struct.calcsize("<" + _SCALARS[inner]))
        return list(struct.unpack(f"<{count}{_SCALARS[inner]}", data))
    return [_value(file, inner) for _ in range(count)]


def _tensor_row(file: BinaryIO) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    name, rank = _string(file), _read(file, "I")
    shape = tuple(_read(file, "Q") for _ in range(rank))[::-1]
    return name, gguf.GGMLQuantizationType(_read(file, "I")), shape, _read(file, "Q")


def _bytes(entry: Entry) -> int:
    block, size = gguf.GGML_QUANT_SIZES[entry.kind]
    return math.prod(entry.shape) // block * size


# GGUF → Hugging Face names; llama.cpp interleaves the two rotary halves of q and k in its llama architecture.
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a tensor, or None for one we do not know."""
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, inner, kind = found.groups()
        return f"model.layers.{layer}.{_INNER[inner]}.{kind}" if inner in _INNER else None
    outer, _, kind = name.rpartition(".")
    return f"{_OUTER[outer]}.{kind}" if outer in _OUTER else None


def tensors(file: GGUF, config: ModelConfig) -> Tensors:
    """The tensors, dequantised to float32 when read.

    Raises:
      LuthierError: for a tensor that this architecture should not have.
    """
    source = {}
    for name in file.entries:
        if hf_name(name) is None:
            raise LuthierError(
                f"tensor {name!r} is not supported",
                where=file.path,
                mend="Use the Hugging Face directory of this model instead",
            )
        source[hf_name(name)] = name

    def read(name: str) -> np.ndarray:
        entry = file.entries[source[name]]
        with file.path.open("rb") as data:
            data.seek(entry.offset)
            raw = np.frombuffer(data.read(_bytes(entry)), np.uint8)
        raw = raw.reshape(gguf.quant_shape_to_byte_shape(entry.shape, entry.kind))
        try:
            weights = gguf.dequantize(raw, entry.kind).astype(np.float32, copy=False).reshape(entry.shape)
        except NotImplementedError:
            raise LuthierError(
                f"tensor {source[name]!r} is stored as {entry.kind.name}, which the gguf package cannot dequantise",
                where=file.path,
                mend="Use a Q4, Q5, Q8, F16 or BF16 file of this model",
            ) from None
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(source[name].split(".")[-2])
        return unpermute(weights, heads) if heads and architecture(file) == "llama" else weights

    info = {ours: (np.dtype(np.float32), file.entries[theirs].shape) for ours, theirs in source.items()}
    return Tensors(info, read, lambda name: f"{file.path}:{source[name]}")


def unpermute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (i, half) back to (half, i) order."""
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def architecture(file: GGUF) -> str:
    name = file.fields.get("general.architecture", "")
    if name not in ARCHITECTURES:
        raise LuthierError(
            f"GGUF architecture {name!r} is not supported",
            where=file.path,
            mend=f"{near(name, ARCHITECTURES)} Or use the model's Hugging Face directory",
        )
    return name


def note(file: GGUF) -> str:
    """What rounding the weights went through, such as "4-bit-rounded weights (Q4_1 GGUF)"; "" for none."""
    sizes = collections.Counter()
    for entry in file.entries.values():
        sizes[entry.kind] += math.prod(entry.shape)
    kind = sizes.most_common(1)[0][0] if sizes else gguf.GGMLQuantizationType.F32
    bits = re.match(r"(?:I?Q|TQ)(\d)", kind.name)
    return f"{bits[1]}-bit-rounded weights ({kind.name} GGUF)" if bits else ""


def config(file: GGUF) -> ModelConfig:
    """The model config that the metadata describe.

    Raises:
      LuthierError: for an unsupported architecture or rope scaling, or a missing key.
    """
    kind = architecture(file)
    get = lambda key, default=None: file.fields.get(f"{kind}.{key}", default)  # noqa: E731
    if "rope_freqs.weight" in file.entries or get("rope.scaling.type", "none") not in ("none", "linear"):
        raise LuthierError(
            "this rope scaling is not supported in GGUF",
            where=file.path,
            mend="Use the Hugging Face directory of this model instead",
        )
    needed = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
    if missing := [f"{kind}.{key}" for key in needed if get(key) is None]:
        raise LuthierError(f"metadata key {missing[0]!r} is missing", where=file.path)
    heads = get("attention.head_count")
    hf = {
        "model_type": kind,
        "vocab_size": file.entries["token_embd.weight"].shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("embedding_length") // heads),
        # Metadata floats are single precision; the shortest decimal that rounds to them is what was meant.
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon", 1e-5)))),
        "rope_theta": float(str(np.float32(get("rope.freq_base", 10000.0)))),
        "max_position_embeddings": get("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": kind == "llama" and "blk.0.attn_output.bias" in file.entries,
        **{f"{name}_token_id": i for name, i in _token_ids(file).items() if name != "unk"},
    }
    if get("rope.scaling.type") == "linear":
        hf["rope_scaling"] = {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    return ModelConfig.from_hf(hf, str(file.path))


def generation_config(file: GGUF) -> dict[str, Any]:
    return {f"{name}_token_id": i for name, i in _token_ids(file).items() if name != "unk"}


def _token_ids(file: GGUF) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: file.fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in names.items()}
    return {name: i for name, i in found.items() if i is not None}


# What `tokenizer.ggml.pre` stands for, as (pre-tokenizer, BPE ignores merges of whole words, normaliser).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(first: dict[str, Any], use_regex: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex)]}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(split, use_regex=False)


_PRE = {
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell"),
        (_sequence({"type": "Digits", "individual_digits": True}, use_regex=True), False, None),
    ),
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), (_byte_level(True), False, None)),
    "llama-bpe": (_split(_LLAMA3), True, None),
    "qwen2": (_split(_QWEN2), False, {"type": "NFC"}),
}
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer(file: GGUF) -> Tokenizer:
    """The tokenizer that the metadata describe, as Hugging Face files.

    Raises:
      LuthierError: for a tokenizer that is not byte-level BPE, or an unknown pre-tokenizer.
    """
    fields, where = file.fields, f"{file.path}:tokenizer.ggml"
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "")
    mend = "Use the Hugging Face directory of this model instead"
    if model != "gpt2":
        raise LuthierError(
            f"tokenizer model {model!r} is not supported, only gpt2 (byte-level BPE)", where=where, mend=mend
        )
    if pre not in _PRE:
        raise LuthierError(f"pre-tokenizer {pre!r} is not supported ({near(pre, _PRE)})", where=where, mend=mend)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    ids = _token_ids(file)
    named = {f"{name}_token": tokens[i] for name, i in ids.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kind == _CONTROL}
        for i, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    pre_tokenizer, ignore_merges, normalizer = _PRE[pre]
    add_bos = fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    add_eos = fields.get("tokenizer.ggml.add_eos_token", False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _template(
            named["bos_token"] if add_bos else None, named["eos_token"] if add_eos else None, tokens
        ),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    side = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.get(f"{architecture(file)}.context_length", 2048),
        **named,
    }
    files = {"tokenizer.json": _dump(content), "tokenizer_config.json": _dump(side)}
    if template := fields.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return Tokenizer.from_files({**files, "generation_config.json": _dump(generation_config(file))}, file.path)


def _template(bos: str | None, eos: str | None, tokens: list[str]) -> dict[str, Any] | None:
    if not (bos or eos):
        return None
    special = lambda token: [{"SpecialToken": {"id": token, "type_id": 0}}] if token else []  # noqa: E731
    text = lambda which: [*special(bos), {"Sequence": {"id": which, "type_id": 0}}, *special(eos)]  # noqa: E731
    known = {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in (bos, eos) if t}
    return {"type": "TemplateProcessing", "single": text("A"), "pair": text("A") + text("B"), "special_tokens": known}


def _dump(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
