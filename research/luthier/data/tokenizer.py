"""Hugging Face tokenizers: text to token ids and back.

Reads `tokenizer.json` with what stands beside it, in the spelling of transformers 4 (template and
`added_tokens_decoder` inside `tokenizer_config.json`) or 5 (`chat_template.jinja`).
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath

from luthier.errors import LuthierError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_HINTS = ("chat_template.json", "config.json", "generation_config.json")  # read, but another's to write
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer and what templates and decoding need to know of it.

    Attributes:
      files: name → content of the files an export writes back.
      fingerprint: sha256 over `files`.
      chat_template: source of the Jinja template, or None.
      special_tokens: `bos_token`, `eos_token`, … → text, as templates see them.
      bos_id, eos_id, pad_id: token ids or None; `pad_id` falls back on `eos_id`, since padding is
        told by position and never by id.
      eos_ids: every id that ends a generation; those of `generation_config.json` included.
      vocab_size: one more than the largest id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, files: Mapping[str, bytes], hints: Mapping[str, bytes], where):
        self._backend = backend
        self.files = dict(files)
        self.fingerprint = _fingerprint(self.files)
        read = functools.partial(_json, {**files, **hints}, where=where)
        config = {**read("special_tokens_map.json"), **read("tokenizer_config.json")}
        self.chat_template = _chat_template(files, config, read("chat_template.json"))
        self.special_tokens = _special_tokens(config)
        _add_missing(backend, config, self.special_tokens, where)
        token_id = lambda name: backend.token_to_id(self.special_tokens.get(name, ""))  # noqa: E731
        generation = {**read("config.json"), **read("generation_config.json")}
        listed = generation.get("eos_token_id")
        listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
        self.bos_id = token_id("bos_token")
        self.eos_id = token_id("eos_token")
        if self.eos_id is None and listed:
            self.eos_id = listed[0]
        self.eos_ids = tuple(dict.fromkeys(i for i in (self.eos_id, *listed) if i is not None))
        pad = token_id("pad_token")
        self.pad_id = self.eos_id if pad is None else pad
        self.vocab_size = max(self.vocabulary().values(), default=-1) + 1

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: object = "tokenizer") -> "Tokenizer":
        """A tokenizer from the content of its files.

        Args:
          files: name → content; `tokenizer.json` is needed. `config.json` and `generation_config.json`
            may be given for their end-of-text ids.

        Raises:
          LuthierError: if `tokenizer.json` is absent or unreadable, or a side file is not JSON.
        """
        if "tokenizer.json" not in files:
            raise LuthierError(
                "no tokenizer.json",
                where=where,
                mend="Save the tokenizer with AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        try:
            backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the library raises bare Exception
            raise LuthierError(f"tokenizer.json is unreadable ({error})", where=where) from None
        backend.no_truncation()
        backend.no_padding()
        kept = {name: files[name] for name in FILES if name in files}
        return cls(backend, kept, {name: files[name] for name in _HINTS if name in files}, where)

    @classmethod
    def from_directory(cls, path: epath.PathLike) -> "Tokenizer":
        """A tokenizer from a directory of any `epath`."""
        path = epath.Path(path)
        found = {name: path / name for name in (*FILES, *_HINTS)}
        return cls.from_files({name: file.read_bytes() for name, file in found.items() if file.exists()}, path)

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          special: add what the tokenizer puts around a text (BOS, EOS). Text such as `<|im_start|>`
            becomes its special token either way.
        """
        return self._backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids of many texts (nothing added) and the characters (start, end) that each token covers."""
        return [
            (found.ids, found.offsets) for found in self._backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry, byte-level alphabet and all."""
        return self._backend.id_to_token(int(token_id))

    def id_of(self, token: str) -> int | None:
        """The id of a whole vocabulary entry."""
        return self._backend.token_to_id(token)


def _fingerprint(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return digest.hexdigest()


def _json(files: Mapping[str, bytes], name: str, *, where: object) -> dict[str, Any]:
    try:
        return json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise LuthierError(f"{name} is not JSON ({error})", where=where) from None


def _text(token: Any) -> str | None:
    """A token is written as its text or as {"content": text, …}."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    named = {**{n: config.get(n) for n in _NAMES}, **(extra if isinstance(extra, dict) else {})}
    return {name: _text(token) for name, token in named.items() if _text(token)}


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], legacy: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = config.get("chat_template", legacy.get("chat_template"))
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template


def _add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str], where) -> None:
    """Adds what tokenizer_config.json knows and tokenizer.json does not, at the ids it states."""
    known = backend.get_vocab(with_added_tokens=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for stated, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        if token["content"] in known:
            continue
        backend.add_tokens([tokenizers.AddedToken(token["content"], **{f: token[f] for f in flags if f in token})])
        if backend.token_to_id(token["content"]) != int(stated):
            raise LuthierError(
                f"tokenizer_config.json gives {token['content']!r} the id {stated}, "
                f"tokenizer.json leaves it {backend.token_to_id(token['content'])}",
                where=where,
                mend="Save the tokenizer again with transformers",
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    listed = [_text(token) for token in extra] if isinstance(extra, list) else []
    new = [text for text in dict.fromkeys((*special.values(), *listed)) if text and text not in added]
    backend.add_special_tokens(new)
