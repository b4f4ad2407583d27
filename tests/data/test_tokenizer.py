import json

import pytest

from megatron_jackpot.data.tokenizer import (
    Vocabulary,
    check_same_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
)


def test_a_folder_that_does_not_exist_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_model_folder_without_tokenizer_is_an_error_and_not_an_empty_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_named_in_the_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_chat_template_that_is_no_text_is_named_in_the_error(tmp_path, make_tokenizer):
    folder = make_tokenizer(tmp_path / "t")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        Vocabulary.read(folder)


def test_a_loaded_tokenizer_gives_the_ids_of_its_vocabulary(tokenizer_folder):
    # Four special tokens, then the characters from the blank (code 32) on.
    assert load_tokenizer(tokenizer_folder).encode("1+2") == [ord(c) - 32 + 4 for c in "1+2"]


def test_two_copies_of_a_tokenizer_have_one_fingerprint(tmp_path, make_tokenizer, tokenizer_folder):
    copy = make_tokenizer(tmp_path, chat=True)
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer_folder)
    check_same_tokenizer({"policy": copy, "actor": tokenizer_folder})


@pytest.mark.parametrize(
    ("actor", "difference"),
    [
        ({"letters": "abd"}, "token 'c' has id 6 and None"),
        ({"letters": "acb"}, "token 'b' has id 5 and 6"),
        ({"letters": "abcd"}, "7 and 8 tokens"),
        ({"letters": "abc", "eos": "<end>"}, "the end-of-text id is 1 and 3"),
    ],
)
def test_another_vocabulary_or_end_of_text_is_refused(tmp_path, make_tokenizer, actor, difference):
    policy = make_tokenizer(tmp_path / "policy", letters="abc")
    with pytest.raises(ValueError, match=difference):
        check_same_tokenizer({"policy": policy, "actor": make_tokenizer(tmp_path / "actor", **actor)})


def test_what_a_folder_says_of_length_cuts_no_prompt_and_fills_none(tmp_path, make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for read in (Vocabulary.read(tmp_path), Vocabulary.of(load_tokenizer(tmp_path))):
        assert read.encode("1+2=") == [ord(c) - 32 + 4 for c in "1+2="]


@pytest.mark.parametrize(
    "config", [{"eos_token": None}, {"eos_token": "<pad>"}, {"split_special_tokens": True}]
)
def test_the_quick_reader_takes_the_same_of_two_files_as_transformers(tmp_path, make_tokenizer, config):
    folder = make_tokenizer(tmp_path)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    quick, slow = Vocabulary.read(folder), Vocabulary.of(load_tokenizer(folder))
    assert quick.eos == slow.eos == 1
    assert quick.encode("1<eos>") == slow.encode("1<eos>")


def test_an_end_of_text_that_is_no_token_is_refused(tmp_path, make_tokenizer):
    path = make_tokenizer(tmp_path) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<nope>"}))
    with pytest.raises(ValueError, match="eos_token = '<nope>', is no token of tokenizer.json"):
        Vocabulary.read(tmp_path)
