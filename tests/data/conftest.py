"""A character tokenizer in an HF folder, made in place: no download."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def save_tokenizer(
    folder: Path, *, letters: str | None = None, chat: bool = False, eos: str = "<eos>"
) -> Path:
    """One token per printable ASCII character, or per letter of `letters`."""
    letters = letters or "".join(map(chr, range(32, 127))) + "\n"
    vocab = {token: id for id, token in enumerate(["<pad>", "<eos>", "<unk>", "<end>", *letters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_tokenizer():
    return save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def chat_tokenizer_folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("chat_tokenizer"), chat=True)
