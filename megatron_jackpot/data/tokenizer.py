"""Tokenizers from HF folders, and the proof that all models speak the same ids.

`Vocabulary` is all that prompts need; it is read without transformers, which takes seconds to import.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from megatron_jackpot.config.model_folder import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What a folder's tokenizer is read from."""


@dataclass(frozen=True)
class Vocabulary:
    """Texts to ids, and what a chat template may name."""

    backend: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """Name in a template, for example eos_token -> its text."""

    @classmethod
    def read(cls, folder: Path) -> "Vocabulary":
        """Of an HF folder. Raises FileNotFoundError for none, ValueError for files that cannot be read."""
        folder = Path(folder)
        backend = _backend(folder)
        config = read_json(folder / "tokenizer_config.json", {})
        # As transformers: the older file counts where the newer one does not list its tokens.
        older = {} if "added_tokens_decoder" in config else read_json(folder / "special_tokens_map.json", {})
        named = {**config, **older}
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        special = {name: _text(named[name]) for name in SPECIAL if named.get(name)}
        known = backend.get_vocab(with_added_tokens=True)
        for _, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            if entry["content"] not in known:
                # A tokenizer.json that was not written anew after tokens were added.
                backend.add_tokens([AddedToken(**{k: v for k, v in entry.items() if k != "__type"})])
        if (eos := special.get("eos_token")) and backend.token_to_id(eos) is None:
            raise ValueError(
                f"{folder}: the end of a text, eos_token = {eos!r}, is no token of tokenizer.json. Mend it "
                "in tokenizer_config.json."
            )
        jinja = folder / "chat_template.jinja"
        try:
            template = jinja.read_text(encoding="utf-8") if jinja.is_file() else config.get("chat_template")
        except UnicodeDecodeError as error:
            raise ValueError(f"{jinja} is not UTF-8: {error}") from error
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        return cls(backend, _default_template(template), special)

    @classmethod
    def of(cls, tokenizer: "Vocabulary | PreTrainedTokenizerFast") -> "Vocabulary":
        """What a tokenizer of transformers gives prompts."""
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if text}
        return cls(tokenizer.backend_tokenizer, _default_template(tokenizer.chat_template), special)

    @property
    def eos(self) -> int | None:
        """The end-of-text id."""
        text = self.special_tokens.get("eos_token")
        return None if text is None else self.backend.token_to_id(text)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts before a text, such as a BOS. What it puts behind one, such as an
        EOS, has no place in a prompt that is to be continued."""
        bare, full = self.encode("a"), self.backend.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens around them."""
        return self.backend.encode(text, add_special_tokens=False).ids


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer saved in an HF folder, never downloaded. Raises FileNotFoundError for none."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    _check_there(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # The tokenizers library raises bare Exception for a file that it cannot read.
        raise _unreadable(folder, error) from error
    # Prompts have limits of their own, and none is made longer than it is.
    _unlimited(tokenizer.backend_tokenizer)
    # It would turn "1 , 2" into "1, 2" and "a .5" into "a.5" before an answer is graded.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def text_of(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[int]) -> str:
    """A response as its reward reads it: without special tokens."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str), "one sequence has one text"
    return text


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 of what gives ids their meaning: the vocabulary, the special ids, the end of a text."""
    meaning = json.dumps(_meaning(folder), sort_keys=True)
    return hashlib.sha256(meaning.encode()).hexdigest()


def check_same_tokenizer(folders: Mapping[str, Path]) -> None:
    """`folders` is model -> folder. Raises FileNotFoundError for one without a tokenizer, ValueError unless
    all have the same vocabulary, special ids and end of a text."""
    for folder in folders.values():
        _check_there(Path(folder))
    (first, first_folder), *others = folders.items()
    for name, folder in others:
        if _bytes(first_folder) == _bytes(folder):
            continue
        first_meaning, meaning = _meaning(first_folder), _meaning(folder)
        if first_meaning != meaning:
            raise ValueError(
                f"{first}.hf = {first_folder} and {name}.hf = {folder} have different tokenizers: "
                f"{_first_difference(first_meaning, meaning)}. Use two models of one family."
            )


def _bytes(folder: Path) -> list[bytes | None]:
    paths = [Path(folder) / name for name in TOKENIZER_FILES[:3]]
    return [path.read_bytes() if path.is_file() else None for path in paths]


def _check_there(folder: Path) -> None:
    # Without this file transformers builds an empty vocabulary from config.json instead of failing.
    if not (folder / "tokenizer.json").is_file():
        problem = "has no tokenizer.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"Tokenizer folder {folder} {problem}. Save one there with save_pretrained.")


def _unreadable(folder: Path, error: Exception) -> ValueError:
    said = str(error).rstrip(".")
    return ValueError(
        f"{folder / 'tokenizer.json'} cannot be read: {said}. Copy it anew, from where the model is from."
    )


def _backend(folder: Path) -> Tokenizer:
    _check_there(folder)
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        # The library raises bare Exception for a file that it cannot read.
        raise _unreadable(folder, error) from error
    _unlimited(backend)
    return backend


def _unlimited(backend: Tokenizer) -> None:
    backend.no_truncation()
    backend.no_padding()


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _default_template(template: Any) -> str | None:
    """Of several templates, which have names, the one called default."""
    return template.get("default") if isinstance(template, dict) else template


def _meaning(folder: Path) -> dict[str, Any]:
    vocabulary = Vocabulary.read(folder)
    backend = vocabulary.backend
    special = sorted(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
    vocab = backend.get_vocab(with_added_tokens=True)
    return {"vocab": vocab, "special": special, "eos": vocabulary.eos}


def _first_difference(policy: dict[str, Any], actor: dict[str, Any]) -> str:
    if len(policy["vocab"]) != len(actor["vocab"]):
        return f"{len(policy['vocab'])} and {len(actor['vocab'])} tokens"
    for token, id in sorted(policy["vocab"].items(), key=lambda item: item[1]):
        if actor["vocab"].get(token) != id:
            return f"token {token!r} has id {id} and {actor['vocab'].get(token)}"
    if policy["eos"] != actor["eos"]:
        return f"the end-of-text id is {policy['eos']} and {actor['eos']}"
    return f"the special ids are {policy['special']} and {actor['special']}"
