"""The testbed: this project's trainer with the sampler of this process in the place of servers.

What is replaced is where rollouts come from, where weights go, and who decodes greedily for the evaluation.
Records, packing, scoring, corrections, losses, distillation and optimizers are the trainer's own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from benchmarks.study_parts import task
from benchmarks.study_parts.decoder import Decoder, greedy
from benchmarks.study_parts.sampler import Draws, sample_groups
from megatron_jackpot.config import Config
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.data.prompts import heldout_prompts, training_prompts
from megatron_jackpot.data.tokenizer import load_tokenizer
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import NOTHING_BEGUN, Keep, Losses, More, Sums, rollouts_of
from megatron_jackpot.rollout.loop_thread import LoopThread
from megatron_jackpot.servers.protocol import Completion
from megatron_jackpot.sync.proof import SyncReport
from megatron_jackpot.sync.stream import WeightStream, export
from megatron_jackpot.train.assembly import checked_stop_ids, load_families, load_model
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.trainer import Trainer

DRAWN = 256
"""Held-out problems of which answers are drawn."""
NO_EPOCH = 1 << 40
"""Of these draws: none of training has it."""

Decode = Callable[[list[list[int]]], list[str]]


class LocalServer:
    """Source of rollouts and end of a push: it holds the served model's weights of the last push.

    It samples in a thread of its own, and a push waits for the samples that are under way.
    """

    def __init__(self, config: Config, draws: Draws, decode: Decode) -> None:
        self.decoder = Decoder(read_hf_config(config.served_hf))
        self.samples, self.draws, self.decode = config.rollout.samples_per_prompt, draws, decode
        self.reward = task.REWARDS[str(config.data.reward).rpartition(":")[2]]
        self.version = -1
        self.num_samples = 0
        """Rollouts that were sampled so far, and processor seconds of that."""
        self.seconds = 0.0
        self.thread = LoopThread()

    def push(
        self, named_tensors: WeightStream, version: int, *, attempt: str, mend: bool = False
    ) -> SyncReport:
        started = time.perf_counter()
        tensors: Mapping[str, Tensor] = dict(named_tensors)
        self.decoder.load(tensors)
        self.version = version
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        seconds = time.perf_counter() - started
        return SyncReport(version=version, seconds=seconds, num_bytes=num_bytes, checksum="", proved=False)

    async def collect(
        self,
        epoch: int,
        prompts: Sequence[Prompt],
        *,
        samples: int | None = None,
        stop: Callable[[], str | None] = lambda: None,
        keep: Keep = lambda group: None,
        more: More | None = None,
        begun: Mapping[int, list[Rollout]] = NOTHING_BEGUN,
        losses: Losses | None = None,
        aside: bool = False,
    ) -> tuple[list[list[Rollout]], Sums]:
        """Whole groups, in the order of `prompts`, all that are in a round at once; it is over too soon to be
        stopped."""
        usual = samples or self.samples
        wanted = more or (lambda prompt, group: usual - len(group))
        groups = [begun.get(prompt.id, []) for prompt in prompts]
        while asked := {i: n for i, p in enumerate(prompts) if (n := wanted(p, groups[i])) > 0}:
            some = [prompts[i] for i in asked]
            numbers = [range(len(groups[i]), len(groups[i]) + n) for i, n in asked.items()]
            began = time.thread_time()
            made = sample_groups(self.decoder, some, numbers, epoch, self.version, self.draws)
            self.seconds += time.thread_time() - began
            self.num_samples += sum(asked.values())
            for i, prompt, completions in zip(asked, some, made, strict=True):
                groups[i] = [*groups[i], *self._judged(prompt, epoch, completions, len(groups[i]))]
                keep(groups[i])
        return groups, {}

    def _judged(self, prompt: Prompt, epoch: int, group: list[Completion], first: int) -> list[Rollout]:
        texts = self.decode([completion.tokens.tolist() for completion in group])
        rewards = [self.reward(text, prompt.label) for text in texts]
        verdicts = [(reward, reward == 1.0) for reward in rewards]
        return rollouts_of(prompt, epoch, group, verdicts, first=first)

    async def hold(self) -> None:
        """The thread that hears this samples nothing any more."""

    async def quiet(self) -> None: ...

    async def use(self, version: int, attempt: str) -> None:
        """Raises RuntimeError for other weights than it was pushed last."""
        if self.version != version:
            raise RuntimeError(f"the sampler holds weight version {self.version}, not {version}.")

    async def abort(self) -> None:
        """Nothing is under way when this is heard."""

    def release(self) -> None:
        """It shares no GPU."""

    def close(self) -> None:
        self.thread.close()


@dataclass(frozen=True)
class Testbed:
    """A run's trainer, and what it is judged by."""

    trainer: Trainer
    heldout: list[Prompt]
    stop_ids: tuple[int, ...]
    draws: Draws
    server: LocalServer

    def close(self) -> None:
        """End the sampler's thread."""
        self.server.close()

    def evaluate(self) -> dict[str, float]:
        """Of every model, greedily: the share of the held-out items it gets right, and of problems without a
        wrong one; with `evaluation.samples` k above 1 also avg@k and pass@k of whole problems, of the first
        DRAWN, with the same draws each time."""
        limit = self.trainer.config.evaluation.max_new_tokens
        prompts, found = [prompt.tokens for prompt in self.heldout], {}
        for name, model in self.trainer.state.models.items():
            decoder = Decoder(model.family.hf_config)
            decoder.load(export(model))
            texts = self.server.decode(greedy(decoder, prompts, max_new_tokens=limit, stop_ids=self.stop_ids))
            shares = [task.score(text, p.label) for text, p in zip(texts, self.heldout, strict=True)]
            found[f"eval/{name}_accuracy"] = sum(shares) / len(shares)
            found[f"eval/{name}_exact"] = sum(share == 1.0 for share in shares) / len(shares)
            if (k := self.trainer.config.evaluation.samples) > 1:
                right = self._drawn(decoder, self.heldout[:DRAWN], k)
                found[f"eval/{name}_avg@{k}"] = sum(right) / (k * len(right))
                found[f"eval/{name}_pass@{k}"] = sum(number > 0 for number in right) / len(right)
        return found

    def _drawn(self, decoder: Decoder, prompts: Sequence[Prompt], samples: int) -> list[int]:
        """Of how many of each problem's drawn answers every item is right."""
        wanted = [range(samples)] * len(prompts)
        made = sample_groups(decoder, prompts, wanted, NO_EPOCH, 0, self.draws)
        groups = [self.server.decode([one.tokens.tolist() for one in group]) for group in made]
        of = zip(groups, prompts, strict=True)
        return [sum(task.exact(text, prompt.label) == 1.0 for text in group) for group, prompt in of]


def build(config: Config, mesh: Mesh) -> Testbed:
    """Everything of a run at its step 0. Raises ValueError or FileNotFoundError naming the field."""
    tokenizer = load_tokenizer(config.policy.hf)
    families = load_families(config)
    eos = tokenizer.eos_token_id
    stop_ids = checked_stop_ids(config, families, eos if isinstance(eos, int) else None)
    training = training_prompts(config.data, tokenizer)
    heldout = heldout_prompts(config.data, config.evaluation, tokenizer, exclude=training.texts)
    models = {name: load_model(name, config, mesh, families) for name in families}
    rollout, seed = config.rollout, config.run.seed
    state = TrainState(
        mesh=mesh,
        policy=models["policy"],
        actor=models.get("actor"),
        methods=Methods.from_config(config),
        guard=Guard(config.guard),
        loader=PromptLoader(training.prompts, rollout.prompts_per_step, 0, 1, seed),
    )
    draws = Draws(
        seed=seed,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        top_k=rollout.top_k_logp,
        stop_ids=stop_ids,
    )

    def decode(answers: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(answers, skip_special_tokens=True)

    server = LocalServer(config, draws, decode)
    trainer = Trainer(config, state, source=server, sync=server)
    drawn = replace(draws, seed=0, temperature=config.evaluation.temperature, top_k=1)
    return Testbed(trainer, heldout.prompts, stop_ids, drawn, server)


def model_files(config: Config) -> list[Path]:
    """What the run starts from, beside code and settings."""
    return [section.hf / "model.safetensors" for section in config.models.values()]
