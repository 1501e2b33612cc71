"""A character tokenizer for the small decoders, and one fingerprint for any tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError, needs
from stillroom.nets.checked import loading, only_files, read_object

END = "<|end|>"
"""Ends a turn, and a generation."""


class Characters:
    """One id per character, plus whole symbols such as the role marks; answers to the names of transformers' tokenizers.

    A conversation is rendered as <|role|>text<|end|> per message.
    """

    def __init__(self, alphabet: str, symbols: Iterable[str] = ("<|system|>", "<|user|>", "<|assistant|>")):
        self._set(["<|pad|>", END, *symbols, *sorted(set(alphabet))])

    @classmethod
    def of(cls, words: Sequence[str]) -> Characters:
        """With exactly these words, as saved."""
        made = cls("")
        made._set(list(words))
        return made

    def with_pairs(self, texts: Iterable[Sequence[int]], count: int) -> Characters:
        """Another tokenizer, of these words and the `count` commonest pairs of characters in `texts` (ids), which it prefers."""
        found: Counter[str] = Counter()
        for ids in texts:
            found.update(a + b for a, b in pairwise(self.words[i] for i in ids) if len(a) == len(b) == 1)
        return Characters.of([*self.words, *(pair for pair, _ in found.most_common(count))])

    def _set(self, words: list[str]) -> None:
        self.words = words
        self.ids = {word: i for i, word in enumerate(self.words)}
        special = sorted((w for w in self.words if len(w) > 1), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, special)) + "|.", re.DOTALL)
        self.pad_token_id, self.eos_token_id = 0, 1

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`. UserError for a character outside the alphabet."""
        try:
            return [self.ids[word] for word in self._split.findall(text)]
        except KeyError as unknown:
            raise UserError(f"The character {unknown} is not in this tokenizer's alphabet of {len(self.words)} words.") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(w for w in (self.words[i] for i in ids) if not (skip_special_tokens and len(w) > 1))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of every token in `text`."""
        return [match.span() for match in self._split.finditer(text)]

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, tokenize: bool = False, add_generation_prompt: bool = False, **_: Any
    ) -> str:
        text = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
        return text + "<|assistant|>" * add_generation_prompt


def pretrained_tokenizer(name: str | Path, what: str = "") -> Any:
    """The transformers tokenizer of an ID or a folder. UserError that names `what` (default: hf:NAME), or the file that is wrong."""
    what, folder = what or f"hf:{name}", Path(name)
    transformers = needs("transformers", "hf", what)
    if folder.is_dir():
        only_files(folder)
        for file in sorted({*folder.glob("*token*.json"), *folder.glob("config.json")}):
            read_object(file)
    try:
        with loading(f"The tokenizer of {what}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            tokenizer.decode(tokenizer("a", add_special_tokens=False)["input_ids"])  # a file that loads may still not serve
            return tokenizer
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of the Rust in tokenizers, which is no Exception
            raise UserError(f"The tokenizer of {what} could not be loaded ({error}).") from error
        raise


def fingerprint(tokenizer: Any) -> str:
    """A hash of what turns text into ids: the same for the same vocabulary and rules, whatever the folder they were loaded from."""
    if isinstance(tokenizer, Characters):
        rules = json.dumps(tokenizer.words)
    elif getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(rules.encode()).hexdigest()[:16]


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans of an already rendered text, without adding special tokens."""
    if isinstance(tokenizer, Characters):
        return tokenizer.encode(text), tokenizer.offsets(text)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets: load the fast tokenizer of this model.")
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(out["input_ids"]), [tuple(span) for span in out["offset_mapping"]]


class Known:
    """A tokenizer that the store can tell from others (see `stillroom.core.store.fingerprint`)."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def fingerprint(self) -> str:
        return fingerprint(self.tokenizer)
