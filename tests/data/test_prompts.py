import datetime
import json

import pytest
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing

from megatron_jackpot.config import Data, Evaluation
from megatron_jackpot.data.problems import Problem, file_problems
from megatron_jackpot.data.prompts import Limits, heldout_prompts, named_prompts, training_prompts
from megatron_jackpot.data.tokenizer import Vocabulary, load_tokenizer

TASKS = {"chain_sum": {"max_digits": 2}, "gcd": {}, "leg_counting": {}}
SMALL = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def gym(tasks=TASKS, **knobs):
    return Data(tasks=tasks, template="Q: {question}\nA: \\boxed{}", **knobs)


def jsonl(path, **knobs):
    return Data(source="jsonl", path=path, **{"template": "{question}", **knobs})


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_tasks_are_mixed_in_equal_shares(tokenizer):
    prompts = training_prompts(gym(size=30), tokenizer).prompts
    assert [prompt.id for prompt in prompts] == list(range(30))
    assert [sum(prompt.label["task"] == task for prompt in prompts) for task in TASKS] == [10, 10, 10]


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(tokenizer):
    one, again, other = (training_prompts(gym(size=12, seed=seed), tokenizer).prompts for seed in (3, 3, 4))
    assert one == again
    assert [prompt.tokens for prompt in one] != [prompt.tokens for prompt in other]


def test_a_smaller_size_is_a_prefix_of_a_larger_one(tokenizer):
    small, large = (training_prompts(gym(size=size), tokenizer).prompts for size in (7, 21))
    assert large[:7] == small


def test_the_template_surrounds_the_question_and_keeps_other_braces(tokenizer):
    prompt = training_prompts(gym(size=1), tokenizer).prompts[0]
    text = "".join(tokenizer.convert_ids_to_tokens(list(prompt.tokens)))
    assert text == f"Q: {prompt.label['entry']['question']}\nA: \\boxed{{}}"


def test_labels_survive_json(tokenizer):
    for prompt in training_prompts(gym(size=6), tokenizer).prompts:
        assert json.loads(json.dumps(prompt.label)) == prompt.label
        assert prompt.label["answer"] == prompt.label["entry"]["answer"]


def test_heldout_problems_differ_from_training_and_from_each_other_and_the_others_are_counted(tokenizer):
    data = gym(SMALL, size=150)
    training = training_prompts(data, tokenizer)
    heldout = heldout_prompts(data, Evaluation(size=20), tokenizer, exclude=training.texts)
    questions = [prompt.label["entry"]["question"] for prompt in heldout.prompts]
    assert len(questions) == len(set(questions)) == 20
    assert not set(questions) & {prompt.label["entry"]["question"] for prompt in training.prompts}
    assert heldout.counts["excluded"] > 0
    assert training.counts["repeated"] == len(training.prompts) - len(training.texts) > 0


def test_named_sets_are_read_up_to_their_size_without_what_is_trained_on(tokenizer, tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(5)]
    one, two = write(tmp_path / "one.jsonl", rows), write(tmp_path / "two.jsonl", rows)
    evaluation = Evaluation(sets={"few": {"path": one, "size": 2}, "all": {"path": two}})
    found = named_prompts(jsonl(one), evaluation, tokenizer, exclude={"1 + 1 ="})
    assert {name: [prompt.id for prompt in prompts] for name, prompts in found.items()} == {
        "few": [0, 2],
        "all": [0, 2, 3, 4],
    }
    with pytest.raises(ValueError, match=r"evaluation\.sets\.all: no prompt of .*two\.jsonl is left"):
        everything = {f"{i} + 1 =" for i in range(5)}
        sets = Evaluation(sets={"all": {"path": two}})
        named_prompts(jsonl(one), sets, tokenizer, exclude=everything)


def test_training_can_be_kept_apart_from_heldout_too(tokenizer):
    data = gym(SMALL, size=100)
    heldout = heldout_prompts(data, Evaluation(size=20), tokenizer, exclude=())
    training = training_prompts(data, tokenizer, exclude=heldout.texts)
    assert not training.texts & heldout.texts
    assert len(training.prompts) == 100 - training.counts["excluded"] < 100


def test_tasks_too_small_for_a_disjoint_heldout_set_are_refused(tokenizer):
    data = gym(SMALL, size=5000)
    with pytest.raises(ValueError, match=r"evaluation\.size = 20, but only \d+ held-out problems"):
        heldout_prompts(data, Evaluation(size=20), tokenizer, exclude=training_prompts(data, tokenizer).texts)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {}}, "no task 'chain_sums'. Did you mean 'chain_sum'"),
        ({"gcd": {"digits": 3}}, r"data\.tasks\.gcd = .*no option 'digits'\. "),
        ({"chain_sum": {"min_terms": -1}}, r"data\.tasks\.chain_sum = "),
        ({"gcd": {"seed": 3}}, "'seed' is set by data.seed"),
        ({"propositional_logic": {}}, "no single text answer"),
    ],
)
def test_an_unusable_task_is_named(tokenizer, tasks, message):
    with pytest.raises(ValueError, match=message):
        training_prompts(gym(tasks, size=3), tokenizer)


def test_prompts_beyond_the_limit_are_dropped_and_told_and_the_others_keep_their_ids(
    tokenizer, tmp_path, caplog
):
    caplog.set_level("INFO")
    rows = [{"prompt": "x" * length, "answer": "1"} for length in (5, 11, 10, 12, 7)]
    chosen = training_prompts(jsonl(write(tmp_path / "a.jsonl", rows), max_prompt_tokens=10), tokenizer)
    assert [(prompt.id, len(prompt.tokens)) for prompt in chosen.prompts] == [(0, 5), (2, 10), (4, 7)]
    assert chosen.counts == {"read": 5, "too_long": 2, "repeated": 0, "excluded": 0}
    assert "training prompts: 3 of 5; 2 longer than data.max_prompt_tokens, 0 repeated" in caplog.text


def test_no_prompt_left_is_an_error(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "long", "answer": 1}])
    with pytest.raises(ValueError, match="No training prompt is left of 1: 1 have more than"):
        training_prompts(jsonl(path, max_prompt_tokens=3), tokenizer)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": "a", "answer": ', "not JSON"),
        ('["a", "b"]', "must be an object, got list"),
        ('{"answer": "1"}', "either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": [], "answer": "1"}', "either 'prompt' or 'messages'"),
        ('{"prompt": 5, "answer": "1"}', "'prompt' must be a text"),
        ('{"prompt": "a"}', "'answer' must be a number or a text"),
        ('{"prompt": "a", "answer": NaN}', "'answer' must be a number or a text"),
        ('{"prompt": "a", "answer": true}', "'answer' must be a number or a text"),
        ('{"messages": [{"role": "user"}], "answer": "1"}', "'role' and 'content'"),
        ('{"messages": "hello", "answer": "1"}', "'messages' must be a list"),
        ('{"prompt": "a", "answer": "1", "answer": "2"}', "the key 'answer' stands twice"),
        ('{"prompt": "a", "answer": "\\ud800"}', "half a surrogate pair"),
        ('{"prompt": "a", "answer": -Infinity}', "'answer' must be a number or a text"),
    ],
)
def test_a_malformed_row_is_an_error_with_file_line_and_reason(tmp_path, row, problem):
    path = write(tmp_path / "bad.jsonl", [{"prompt": "fine", "answer": "1"}, "", row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{problem}"):
        file_problems(path)


def test_bytes_that_are_not_utf8_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1: not UTF-8"):
        file_problems(tmp_path / "latin.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        file_problems(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "number", ["0.00001", "1e16", "18.0", "1E-400", "12345678901234567890123", "0.1", "-0"]
)
def test_a_number_as_answer_stays_as_it_is_written(tmp_path, number):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", "answer": {number}, "weight": 0.00001}}\n')
    (problem,) = file_problems(tmp_path / "a.jsonl")
    assert problem.label == {"answer": number, "weight": 0.00001}


def test_numbers_are_answers_and_other_keys_reach_the_label(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "6 * 7", "answer": 42, "level": "easy"}])
    assert file_problems(path) == [Problem(0, "6 * 7", {"answer": "42", "level": "easy"})]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # As Windows' editors do.
    assert file_problems(path) == [Problem(0, "6 * 7", {"answer": "42", "level": "easy"})]


def test_prompt_and_messages_take_the_chat_template(tmp_path, chat_tokenizer_folder):
    tokenizer = load_tokenizer(chat_tokenizer_folder)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]
    rows = [{"prompt": "1+1", "answer": "2"}, {"messages": chat, "answer": "2"}]
    chosen = training_prompts(jsonl(write(tmp_path / "a.jsonl", rows), template=None), tokenizer)
    texts = ["".join(tokenizer.convert_ids_to_tokens(list(prompt.tokens))) for prompt in chosen.prompts]
    assert texts == ["u:1+1;a:", "s:be brief;u:1+1;a:"]


def test_templates_that_cannot_work_are_refused(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "1+1"}], "answer": "2"}])
    for template, message in [
        (None, "no chat template. Set data.template"),
        ("Q: ", "does not contain {question}"),
        ("{question}", "is a chat"),
    ]:
        with pytest.raises(ValueError, match=message):
            training_prompts(jsonl(path, template=template), tokenizer)


def test_a_heldout_row_also_in_training_is_dropped_whatever_its_form_and_spacing(tokenizer, tmp_path):
    train = write(tmp_path / "train.jsonl", [{"prompt": "what is 1+1?", "answer": "2"}])
    rows = [{"prompt": text, "answer": "0"} for text in ("what is\n 1+1?", "2+2?", "2+2?", "3+3?")]
    data = jsonl(train, heldout_path=write(tmp_path / "heldout.jsonl", rows))
    chosen = heldout_prompts(data, Evaluation(), tokenizer, exclude=training_prompts(data, tokenizer).texts)
    assert [prompt.id for prompt in chosen.prompts] == [1, 3]
    assert chosen.counts == {"read": 4, "too_long": 0, "repeated": 1, "excluded": 1}
    as_chat = [{"role": "system", "content": "hi"}, {"role": "user", "content": "what is 1+1?"}]
    assert Problem(0, as_chat, {}).text == "what is 1+1?"


def test_evaluation_without_heldout_data_is_refused_unless_it_is_off(tokenizer, tmp_path):
    data = jsonl(write(tmp_path / "train.jsonl", [{"prompt": "1+1", "answer": "2"}]))
    with pytest.raises(ValueError, match=r"needs data\.heldout_path"):
        heldout_prompts(data, Evaluation(), tokenizer, exclude=())
    assert heldout_prompts(data, Evaluation(size=0), tokenizer, exclude=()).prompts == []


def with_template(folder, to, template):
    """A copy of a tokenizer's folder with another chat template."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(to)
    return load_tokenizer(to), Vocabulary.read(to)


def one_row(tmp_path, **row):
    return write(tmp_path / "one.jsonl", [{"prompt": "1+1", "answer": "2", **row}])


def test_a_prompt_neither_ends_with_the_eos_that_a_tokenizer_appends_nor_begins_with_two_bos(
    tmp_path, make_tokenizer
):
    folder = make_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    bos, eos = ("<pad>", 0), ("<eos>", 1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[bos, eos]
    )
    tokenizer.save_pretrained(folder)
    for read in (load_tokenizer(folder), Vocabulary.read(folder)):
        for template in ("{question}", "<pad>{question}"):
            data = jsonl(one_row(tmp_path), template=template)
            (prompt,) = training_prompts(data, read).prompts
            assert prompt.tokens == (0, *(ord(c) - 32 + 4 for c in "1+1"))


def test_a_prompt_that_a_template_ends_with_eos_is_refused_by_line(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"one.jsonl, line 1: the prompt ends with the end-of-text id 1"):
        training_prompts(jsonl(one_row(tmp_path), template="{question}<eos>"), tokenizer)


@pytest.mark.parametrize("role", ["assistant", "Assistant", "model", "gpt"])
def test_an_answer_that_stands_in_the_prompt_is_refused_by_line(tmp_path, role):
    chat = [{"role": "user", "content": "1+1"}, {"role": role, "content": "2"}]
    path = write(tmp_path / "sft.jsonl", [{"messages": chat, "answer": "2"}])
    with pytest.raises(
        ValueError, match=rf"sft.jsonl, line 1: 'messages' ends with the role '{role}': an answer"
    ):
        file_problems(path)


def test_what_a_template_refuses_and_half_a_surrogate_pair_name_file_and_line(tmp_path, tokenizer_folder):
    raises = (
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}{{ messages[0].content }}"
    )
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": "1", "answer": "2"}, {"messages": chat, "answer": "2"}])
    for read in with_template(tokenizer_folder, tmp_path / "raises", raises):
        with pytest.raises(
            ValueError, match=r"a.jsonl, line 2: the chat template refuses it: no system role"
        ):
            training_prompts(jsonl(path, template=None), read)
    for number, broken in enumerate(("{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}")):
        for read in with_template(tokenizer_folder, tmp_path / f"broken{number}", broken):
            with pytest.raises(ValueError, match=r"a.jsonl, line 1: the chat template refuses it: "):
                training_prompts(jsonl(path, template=None), read)
    with pytest.raises(ValueError, match=r"one.jsonl, line 1: 'prompt' holds half a surrogate"):
        file_problems(one_row(tmp_path, prompt="1\ud800"))


@pytest.mark.parametrize("template", ["[]", "{{ messages[0].role }}", "{{ messages | length }}"])
def test_a_template_that_leaves_the_problem_out_is_refused(template, tmp_path, tokenizer_folder):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{i}+1", "answer": "2"} for i in range(3)])
    for read in with_template(tokenizer_folder, tmp_path / "empty", template):
        with pytest.raises(ValueError, match="3 different problems give one and the same prompt"):
            training_prompts(jsonl(path, template=None), read)


@pytest.mark.parametrize("draws", ["{{ ['a', 'b'] | random }}{{ messages[0].content }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_lots_is_refused(draws, tmp_path, tokenizer_folder):
    for read in with_template(tokenizer_folder, tmp_path / "draws", draws):
        with pytest.raises(ValueError, match="random|lipsum"):
            training_prompts(jsonl(one_row(tmp_path), template=None), read)


def test_template_args_reach_the_chat_template(tmp_path, tokenizer_folder):
    thinking = (
        "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
    )
    for read in with_template(tokenizer_folder, tmp_path / "thinking", thinking):
        texts = []
        for arguments in ({}, {"enable_thinking": False}):
            data = jsonl(one_row(tmp_path), template=None, template_args=arguments)
            texts.append(len(training_prompts(data, read).prompts[0].tokens))
        assert texts == [3, 4]


def test_a_template_with_the_date_shows_the_day_on_which_the_run_began(tmp_path, tokenizer_folder):
    dated = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    for read in with_template(tokenizer_folder, tmp_path / "dated", dated):
        limits = Limits(now=datetime.datetime(2024, 2, 29))
        (prompt,) = training_prompts(jsonl(one_row(tmp_path), template=None), read, limits=limits).prompts
        assert prompt.tokens == tuple(ord(c) - 32 + 4 for c in "29 Feb 2024 1+1")


@pytest.mark.parametrize("first", [True, False])
def test_chat_templates_read_as_transformers_reads_them(first, tmp_path, tokenizer_folder):
    template = (
        "{%- for m in messages %}\n  {% if loop.first and m.role == 'system' %}[{{ m.content | trim }}]"
        "{% continue %}{% endif %}\n{% generation %}{{ m.content }}{% endgeneration %}{{ m | tojson }}"
        "{% endfor %}\n{% if tools is none %}{{ eos_token }}{% endif %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    chat = [{"role": "system", "content": " be <brief> "}, {"role": "user", "content": "1+1"}][not first :]
    path = write(tmp_path / "a.jsonl", [{"messages": chat, "answer": "2"}])
    tokenizer, vocabulary = with_template(tokenizer_folder, tmp_path / "rich", template)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    want = tuple(tokenizer.encode(text, add_special_tokens=False))
    for read in (tokenizer, vocabulary):
        assert training_prompts(jsonl(path, template=None), read).prompts[0].tokens == want


@pytest.mark.parametrize("answer", ["1 , 2 , 3", "a .5"])
def test_nothing_is_cleaned_up_in_an_answer_before_it_is_graded(answer, tmp_path, make_tokenizer):
    folder = make_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "clean_up_tokenization_spaces": True, "chat_template": None})
    )
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    assert tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False)) == answer
