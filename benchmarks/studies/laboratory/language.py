"""The laboratory's language: some six hundred words with one blank between them, and line breaks.

A word is a token, numbers up to 99 and punctuation too; nothing is inside a word. The tokenizer is an ordinary
`tokenizer.json`; texts of the language survive encoding and decoding.
"""

import itertools
import json
import random

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
BREAKS = ("\n", "\n\n")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
VOWELS = "aeiou"
NUMBERS = tuple(map(str, range(100)))
CATEGORIES = {
    "animal": "cat dog horse cow sheep goat lion tiger bear wolf fox mouse",
    "food": "bread cheese apple rice soup egg honey butter cake bean onion salt",
    "color": "red green blue yellow black white brown pink purple gray orange gold",
    "tool": "hammer saw drill wrench knife axe spade rope ladder brush needle nail",
    "body": "hand foot head arm leg eye ear nose mouth knee back neck",
    "cloth": "shirt coat hat shoe sock glove scarf belt dress skirt boot cap",
    "place": "city village river lake forest hill desert island harbor bridge street farm",
    "job": "baker doctor teacher farmer painter sailor judge singer miner weaver guard cook",
    "weather": "rain snow wind storm fog hail cloud sun frost thunder breeze ice",
    "music": "drum flute violin piano harp horn guitar trumpet organ bell cello whistle",
}
CATEGORIES = {name: tuple(words.split()) for name, words in CATEGORIES.items()}
WORDS = tuple(itertools.chain(*CATEGORIES.values()))
# Words that other languages have a word for: half of every category.
LEXICON = tuple(word for words in CATEGORIES.values() for word in words[:6])


def _invented(consonants: str, vowels: str, endings: str) -> tuple[str, ...]:
    made = ["".join(parts) for parts in itertools.product(consonants, vowels, endings)]
    made = [word for word in made if word not in (*WORDS, *CATEGORIES)]
    random.Random(0).shuffle(made)
    return tuple(made[: len(LEXICON)])


# Three invented languages tell themselves by their sounds; word i of each means word i of LEXICON.
LANGUAGES = {
    "plain": LEXICON,
    "bakan": _invented("bkptdg", "ao", "kntmr"),
    "zelin": _invented("zvsfjl", "ei", "lnsvz"),
    "muhor": _invented("mhwrnq", "ou", "hrwmx"),
}
LABELS = tuple(
    "yes no true false up down high low positive negative accept reject good bad old new hot cold first last open "
    "close fast slow rich poor early late near far sweet sour loud quiet left right alpha beta gamma delta".split()
)
# What formats are made of. The second of each pair are held out: no episode of pretraining has them in a format.
FIELDS = (
    "input output question answer query reply source target given result problem solution text label item value "
    "before after task do request response x y in out start end prompt completion".split()
)
HELD_OUT_FIELDS = "passage verdict signal echo puzzle key clue finding stimulus reaction cause effect".split()
MARKS = (":", "=", "->", "=>", "|", "is", "-", "?")
HELD_OUT_MARKS = ("::", "~", ">>", "becomes")
WRAPS = (("(", ")"), ("[", "]"), ("<", ">"), ('"', '"'), ("*", "*"), ("", "."), ("", ";"))
HELD_OUT_WRAPS = (("{", "}"), ("/", "/"), ("", "!"))
BETWEEN_ITEMS = ("", ",", "&", "+")
BETWEEN_GROUPS = ("//", "and", "with", "versus")
FILLERS = ("the", "of", "for", "this")
INSTRUCTIONS = tuple(
    "copy reverse second middle sort ascending descending rotate swap double each next previous drop count "
    "largest smallest add subtract plus minus ten sequence category translate to choose if or else lookup longest "
    "parity even odd below above fifty greater smaller same different kind member absent vowel consonant language "
    "palindrome ordered unordered uneven odd-one subset sum outer repeat most".split()
)


def vocabulary() -> tuple[str, ...]:
    """Every token, special ones first; the order is the ids."""
    parts = [
        *(SPECIAL, BREAKS, LETTERS, NUMBERS, CATEGORIES, WORDS, *LANGUAGES.values(), LANGUAGES, LABELS),
        *(FIELDS, HELD_OUT_FIELDS, MARKS, HELD_OUT_MARKS, *WRAPS, *HELD_OUT_WRAPS),
        *(BETWEEN_ITEMS, BETWEEN_GROUPS, FILLERS, INSTRUCTIONS),
    ]
    return tuple(word for word in dict.fromkeys(itertools.chain(*parts)) if word)


def tokenizer_files() -> dict[str, bytes]:
    """`tokenizer.json` and what stands beside it. A text begins with `<s>`; `</s>` ends it and `<pad>` is no end."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    blank = pre_tokenizers.Split(" ", behavior="removed")
    breaks = pre_tokenizers.Split(tokenizers.Regex("\n+"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([blank, breaks])
    # WordPiece here only puts the blanks back; around line breaks there are none.
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
        ]
    )
    backend.add_special_tokens(list(SPECIAL))
    start = [("<s>", ids["<s>"])]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL))
    side = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(side, indent=1).encode()}
