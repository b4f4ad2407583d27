"""Tokenizers from HF folders, and the proof that policy and actor speak the same ids."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in an HF folder, never downloaded. Raises FileNotFoundError for none."""
    folder = Path(folder)
    # Without this file transformers builds an empty vocabulary from config.json instead of failing.
    if not (folder / "tokenizer.json").is_file():
        problem = "has no tokenizer.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"Tokenizer folder {folder} {problem}. Save one there with save_pretrained.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # The tokenizers library raises bare Exception for a file that it cannot read.
        raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """A response as its reward reads it: without special tokens."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str), "one sequence has one text"
    return text


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 of what gives ids their meaning: the vocabulary, the special ids, the end of a text."""
    meaning = json.dumps(_meaning(folder), sort_keys=True)
    return hashlib.sha256(meaning.encode()).hexdigest()


def check_same_tokenizer(policy_folder: Path, actor_folder: Path) -> None:
    """Raises ValueError unless both folders have the same fingerprint."""
    if tokenizer_fingerprint(policy_folder) == tokenizer_fingerprint(actor_folder):
        return
    policy, actor = _meaning(policy_folder), _meaning(actor_folder)
    raise ValueError(
        f"policy.hf = {policy_folder} and actor.hf = {actor_folder} have different tokenizers: "
        f"{_first_difference(policy, actor)}. Use two models of one family."
    )


def _meaning(folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    special = sorted(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {"vocab": tokenizer.get_vocab(), "special": special, "eos": tokenizer.eos_token_id}


def _first_difference(policy: dict[str, Any], actor: dict[str, Any]) -> str:
    if len(policy["vocab"]) != len(actor["vocab"]):
        return f"{len(policy['vocab'])} and {len(actor['vocab'])} tokens"
    for token, id in sorted(policy["vocab"].items(), key=lambda item: item[1]):
        if actor["vocab"].get(token) != id:
            return f"token {token!r} has id {id} and {actor['vocab'].get(token)}"
    if policy["eos"] != actor["eos"]:
        return f"the end-of-text id is {policy['eos']} and {actor['eos']}"
    return f"the special ids are {policy['special']} and {actor['special']}"
