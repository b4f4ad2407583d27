"""Training and held-out prompts from the configuration, and the account of what was left out."""

import datetime
import logging
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_jackpot.config import Data, Evaluation
from megatron_jackpot.data.chat_template import ChatTemplate
from megatron_jackpot.data.problems import Problem, file_problems, place_in, reasoning_gym_problems
from megatron_jackpot.data.tokenizer import Vocabulary
from megatron_jackpot.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

MAX_DRAWS = 20
"""reasoning_gym: draws per held-out problem wanted before the tasks count as exhausted."""
MAX_REPORTED = 5
"""Rows of one file whose mistakes are named."""
PROGRESS_ROWS = 1000


@dataclass(frozen=True)
class Limits:
    """What a prompt must fit beside data.max_prompt_tokens, and how it is read."""

    rows: dict[str, int] = field(default_factory=dict)
    """Model -> rows of its embedding. Example: {"policy": 61, "actor": 64}."""
    now: datetime.datetime | None = None
    """What a template takes for the present, so that a run's prompts stay what they were; None is now."""
    progress: Callable[[int], None] = lambda rows: None
    """Told the number of problems read, every PROGRESS_ROWS of them."""


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
    data: Data,
    tokenizer: "PreTrainedTokenizerFast | Vocabulary",
    *,
    exclude: Container[str] = (),
    limits: Limits | None = None,
) -> PromptSet:
    """All usable problems of data.path, or of data.size reasoning-gym draws.

    Raises ValueError for none, and with a line for each problem that no run could train on.
    """
    choice = _Choice(data, tokenizer, limits or Limits(), exclude)
    if data.source == "jsonl":
        assert data.path is not None
        choice.read(file_problems(data.path, choice.mistakes), data.path, keep_repeated=True)
    else:
        problems = reasoning_gym_problems(data.tasks, data.seed, data.size)
        choice.read(problems, "data.tasks", keep_repeated=True)
    chosen = choice.done()
    if not chosen.counts["read"] and data.source == "jsonl":
        raise ValueError(
            f"data.path = {data.path} holds no rows. Write a JSON object a line: docs/your-own.md."
        )
    if not chosen.prompts:
        raise ValueError(
            f"No training prompt is left of {chosen.counts['read']}: {chosen.counts['too_long']} have more "
            f"than data.max_prompt_tokens = {data.max_prompt_tokens} tokens. Raise it, or change data.*."
        )
    _tell("training", chosen)
    return chosen


def heldout_prompts(
    data: Data,
    evaluation: Evaluation,
    tokenizer: "PreTrainedTokenizerFast | Vocabulary",
    *,
    exclude: Container[str],
    limits: Limits | None = None,
) -> PromptSet:
    """evaluation.size problems whose text is not in `exclude`, each once; all there are of a shorter file.

    Raises ValueError when the file has none, or reasoning-gym cannot give so many, and as `training_prompts`.
    """
    size = evaluation.size
    choice = _Choice(data, tokenizer, limits or Limits(), exclude)
    if size == 0:
        return choice.done()
    if data.source == "reasoning_gym":
        problems = reasoning_gym_problems(data.tasks, evaluation.seed, MAX_DRAWS * size)
        choice.read(problems, "data.tasks (held out)", size=size)
    elif data.heldout_path is None:
        raise ValueError(
            f"evaluation.size = {size} with data.source = 'jsonl' needs data.heldout_path. Set it, or "
            "evaluation.size=0."
        )
    else:
        choice.read(file_problems(data.heldout_path, choice.mistakes), data.heldout_path, size=size)
    chosen = choice.done()
    if len(chosen.prompts) < (size if data.source == "reasoning_gym" else 1):
        raise ValueError(
            f"evaluation.size = {size}, but only {len(chosen.prompts)} held-out problems differ from the "
            f"training problems and fit: of {chosen.counts['read']} read {chosen.counts['excluded']} are "
            f"trained on, {chosen.counts['too_long']} too long. Lower evaluation.size, or add rows."
        )
    _tell("held-out", chosen)
    return chosen


def named_prompts(
    data: Data,
    evaluation: Evaluation,
    tokenizer: "PreTrainedTokenizerFast | Vocabulary",
    *,
    exclude: Container[str],
    limits: Limits | None = None,
) -> dict[str, list[Prompt]]:
    """The prompts of each of evaluation.sets, less those in `exclude`. Raises ValueError and
    FileNotFoundError as `heldout_prompts`."""
    found = {}
    for name, one in evaluation.sets.items():
        choice = _Choice(data, tokenizer, limits or Limits(), exclude)
        choice.read(file_problems(one.path, choice.mistakes), one.path, size=one.size)
        chosen = choice.done()
        if not chosen.prompts:
            raise ValueError(f"evaluation.sets.{name}: no prompt of {one.path} is left: {chosen.counts}.")
        _tell(f"evaluation.sets.{name}", chosen)
        found[name] = chosen.prompts
    return found


def _tell(name: str, chosen: PromptSet) -> None:
    """What came of a file, in one line: a count that nobody sees is none."""
    counts = chosen.counts
    log.info(
        f"{name} prompts: {len(chosen.prompts)} of {counts['read']}; {counts['too_long']} longer than "
        f"data.max_prompt_tokens, {counts['repeated']} repeated, {counts['excluded']} in the other set"
    )


class _Choice:
    """Problems that are allowed and short enough, as prompts, and what is wrong with the others."""

    def __init__(
        self,
        data: Data,
        tokenizer: "PreTrainedTokenizerFast | Vocabulary",
        limits: Limits,
        exclude: Container[str],
    ) -> None:
        self.data, self.limits, self.exclude = data, limits, exclude
        self.mistakes: list[str] = []
        self.prompts: list[Prompt] = []
        self.texts: set[str] = set()
        self.counts = {"read": 0, "too_long": 0, "repeated": 0, "excluded": 0}
        self.render = _Renderer(Vocabulary.of(tokenizer), data, limits)

    def read(
        self,
        problems: Iterable[Problem],
        origin: Path | str,
        *,
        size: int | None = None,
        keep_repeated: bool = False,
    ) -> None:
        """The first `size` that can be used; a mistake names `origin` and the line."""
        for problem in problems:
            if len(self.prompts) == size:
                break
            try:
                tokens = self.render(problem)
            except ValueError as error:
                generated = isinstance(origin, str)
                place = f"problem {problem.id}" if generated else place_in(origin, problem.id)
                self.mistakes.append(f"{origin}, {place}: {error}")
                continue
            too_long = len(tokens) > self.data.max_prompt_tokens
            text = problem.text
            repeated, excluded = text in self.texts, text in self.exclude
            self.counts["read"] += 1
            self.counts["too_long"] += too_long
            self.counts["repeated"] += repeated
            self.counts["excluded"] += excluded
            if not too_long and not excluded and (keep_repeated or not repeated):
                self.prompts.append(Prompt(problem.id, tokens, problem.label))
                self.texts.add(text)
            if self.counts["read"] % PROGRESS_ROWS == 0:
                self.limits.progress(self.counts["read"])

    def done(self) -> PromptSet:
        """Raises ValueError with the mistakes, the first of them by name."""
        prompts = self.prompts
        if len(self.texts) > 1 and all(prompt.tokens == prompts[0].tokens for prompt in prompts):
            self.mistakes.append(
                f"{len(self.texts)} different problems give one and the same prompt: the template leaves "
                "them out. Set data.template, or mend the chat template."
            )
        if self.mistakes:
            left = len(self.mistakes) - MAX_REPORTED
            more = [f"... and {left} more rows."] if left > 0 else []
            raise ValueError("\n".join([*self.mistakes[:MAX_REPORTED], *more]))
        return PromptSet(self.prompts, frozenset(self.texts), self.counts)


class _Renderer:
    """Problem -> token ids, by data.template or by the tokenizer's chat template."""

    def __init__(self, vocabulary: Vocabulary, data: Data, limits: Limits):
        template = data.template
        if template is None and vocabulary.chat_template is None:
            raise ValueError(
                "data.template is not set and the tokenizer has no chat template. Set data.template."
            )
        if template is not None and "{question}" not in template:
            raise ValueError(
                f"data.template = {template!r} does not contain {{question}}. Put it where the text goes."
            )
        self.vocabulary, self.template, self.limits = vocabulary, template, limits
        self.chat: ChatTemplate | None = None
        if template is None and vocabulary.chat_template is not None:
            now = limits.now or datetime.datetime.now()
            arguments = data.template_args
            self.chat = ChatTemplate(vocabulary.chat_template, vocabulary.special_tokens, arguments, now)

    def __call__(self, problem: Problem) -> tuple[int, ...]:
        """Raises ValueError for a problem that gives no prompt a run could be trained on."""
        prefix = self.vocabulary.prefix
        tokens = tuple(self.vocabulary.encode(self._text(problem.question)))
        if self.chat is None and tokens[: len(prefix)] != prefix:
            # A chat template writes its own special tokens, another one may write a BOS.
            tokens = prefix + tokens
        if len(prefix) == 1 and tokens[:2] == prefix * 2:
            tokens = tokens[1:]
        self._check(tokens, problem)
        return tokens

    def _text(self, question: str | list[dict[str, str]]) -> str:
        if self.chat is not None:
            return self.chat(
                [{"role": "user", "content": question}] if isinstance(question, str) else question
            )
        assert self.template is not None
        if not isinstance(question, str):
            raise ValueError("it is a chat, which data.template cannot hold. Set data.template=null.")
        # Not str.format: templates may hold other braces, as in \boxed{}.
        return self.template.replace("{question}", question)

    def _check(self, tokens: tuple[int, ...], problem: Problem) -> None:
        if not tokens:
            raise ValueError(f"no tokens are left after the template: {problem.question!r}.")
        if tokens[-1] == self.vocabulary.eos and len(tokens) > len(self.vocabulary.prefix):
            raise ValueError(
                f"the prompt ends with the end-of-text id {tokens[-1]}, after which nothing follows. Change "
                "the template or the row."
            )
        largest = max(tokens)
        for name, rows in self.limits.rows.items():
            if largest >= rows:
                raise ValueError(
                    f"token {largest} is outside {name}.hf, whose embedding has {rows} rows. Leave the row "
                    "out, or use a model that was trained with this tokenizer."
                )
