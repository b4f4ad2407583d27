"""Training and held-out prompts from the configuration, and the account of what was left out."""

import logging
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from megatron_jackpot.config import Data, Evaluation
from megatron_jackpot.data.problems import Problem, jsonl_problems, reasoning_gym_problems
from megatron_jackpot.records import Prompt

log = logging.getLogger(__name__)

MAX_DRAWS = 20
"""reasoning_gym: draws per held-out problem wanted before the tasks count as exhausted."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are used, and the account of the others."""

    prompts: list[Prompt]
    texts: frozenset[str]
    """Normalised question texts of the prompts; pass them as `exclude` to keep another set disjoint."""
    counts: dict[str, int]
    """read: problems seen; too_long: beyond data.max_prompt_tokens; repeated: text seen before in this set
    (kept in training, dropped from the held-out set); excluded: text in `exclude`."""


def training_prompts(
    data: Data, tokenizer: PreTrainedTokenizerFast, *, exclude: Container[str] = ()
) -> PromptSet:
    """All usable problems of data.path, or of data.size reasoning-gym draws. Raises ValueError for none."""
    chosen = _choose(_training_problems(data), data, tokenizer, exclude, keep_repeated=True)
    if not chosen.prompts:
        raise ValueError(
            f"No training prompt is left: {chosen.counts}. Check data.* and data.max_prompt_tokens."
        )
    _tell("training", chosen)
    return chosen


def heldout_prompts(
    data: Data, evaluation: Evaluation, tokenizer: PreTrainedTokenizerFast, *, exclude: Container[str]
) -> PromptSet:
    """evaluation.size problems whose text is not in `exclude`, each once; all there are of a shorter file.

    Raises ValueError when the file has none, or reasoning-gym cannot give so many.
    """
    size = evaluation.size
    if size == 0:
        return PromptSet([], frozenset(), {"read": 0, "too_long": 0, "repeated": 0, "excluded": 0})
    chosen = _choose(_heldout_problems(data, evaluation), data, tokenizer, exclude, size=size)
    if len(chosen.prompts) < (size if data.source == "reasoning_gym" else 1):
        raise ValueError(
            f"evaluation.size = {size}, but only {len(chosen.prompts)} held-out problems differ from the "
            f"training problems and fit: {chosen.counts}. Lower evaluation.size or data.size."
        )
    _tell("held-out", chosen)
    return chosen


def _tell(name: str, chosen: PromptSet) -> None:
    """What came of a file, in one line: a count that nobody sees is none."""
    counts = chosen.counts
    log.info(
        f"{name} prompts: {len(chosen.prompts)} of {counts['read']}; {counts['too_long']} longer than "
        f"data.max_prompt_tokens, {counts['repeated']} repeated, {counts['excluded']} in the other set"
    )


def _training_problems(data: Data) -> Iterable[Problem]:
    if data.source == "jsonl":
        assert data.path is not None, "Config asks for it"
        return jsonl_problems(data.path)
    return reasoning_gym_problems(data.tasks, data.seed, data.size)


def _heldout_problems(data: Data, evaluation: Evaluation) -> Iterable[Problem]:
    if data.source == "reasoning_gym":
        return reasoning_gym_problems(data.tasks, evaluation.seed, MAX_DRAWS * evaluation.size)
    if data.heldout_path is None:
        raise ValueError(
            f"evaluation.size = {evaluation.size} with data.source = 'jsonl' needs data.heldout_path. "
            "Set it, or evaluation.size=0."
        )
    return jsonl_problems(data.heldout_path)


def _choose(
    problems: Iterable[Problem],
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    exclude: Container[str],
    *,
    size: int | None = None,
    keep_repeated: bool = False,
) -> PromptSet:
    """The first `size` problems that are allowed and short enough."""
    render = _Renderer(tokenizer, data.template)
    prompts: list[Prompt] = []
    texts: set[str] = set()
    counts = {"read": 0, "too_long": 0, "repeated": 0, "excluded": 0}
    for problem, tokens in _tokenized(problems, render):
        if len(prompts) == size:
            break
        too_long = len(tokens) > data.max_prompt_tokens
        repeated, excluded = problem.text in texts, problem.text in exclude
        counts["read"] += 1
        counts["too_long"] += too_long
        counts["repeated"] += repeated
        counts["excluded"] += excluded
        if not too_long and not excluded and (keep_repeated or not repeated):
            prompts.append(Prompt(problem.id, tokens, problem.label))
            texts.add(problem.text)
    return PromptSet(prompts, frozenset(texts), counts)


def _tokenized(problems: Iterable[Problem], render: "_Renderer") -> Iterator[tuple[Problem, tuple[int, ...]]]:
    for problem in problems:
        tokens = render(problem)
        if not tokens:
            raise ValueError(f"Problem {problem.id} has no tokens after the template: {problem.question!r}.")
        yield problem, tokens


class _Renderer:
    """Problem -> token ids, by data.template or by the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None):
        if template is None and tokenizer.chat_template is None:
            raise ValueError(
                "data.template is not set and the tokenizer has no chat template. Set data.template."
            )
        if template is not None and "{question}" not in template:
            raise ValueError(f"data.template = {template!r} does not contain {{question}}.")
        self.tokenizer, self.template = tokenizer, template

    def __call__(self, problem: Problem) -> tuple[int, ...]:
        question = problem.question
        if self.template is None:
            messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert isinstance(text, str), "tokenize=False"
            # The chat template writes its own special tokens.
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        if not isinstance(question, str):
            raise ValueError(
                f"Problem {problem.id} is a chat, which data.template cannot hold. Set data.template=null."
            )
        # Not str.format: templates may hold other braces, as in \boxed{}. The tokenizer adds its
        # usual special tokens, such as a BOS.
        return tuple(self.tokenizer.encode(self.template.replace("{question}", question)))
