"""The testbed: this project's trainer with the sampler of this process in the place of servers.

What is replaced is where rollouts come from, where weights go, and who decodes greedily for the evaluation.
Records, packing, scoring, corrections, losses, distillation and optimizers are the trainer's own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.study_parts.decoder import Decoder, greedy
from benchmarks.study_parts.sampler import Draws, sample_groups
from benchmarks.study_parts.task import score
from megatron_jackpot.config import Config
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.data.prompts import heldout_prompts, training_prompts
from megatron_jackpot.data.tokenizer import load_tokenizer
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import Keep, Sums, rollouts_of
from megatron_jackpot.rollout.loop_thread import LoopThread
from megatron_jackpot.servers.protocol import Completion
from megatron_jackpot.sync.proof import SyncReport
from megatron_jackpot.sync.stream import WeightStream, export
from megatron_jackpot.train.assembly import checked_stop_ids, load_families, load_model
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.trainer import Trainer

Decode = Callable[[list[list[int]]], list[str]]


class LocalServer:
    """Source of rollouts and end of a push: it holds the served model's weights of the last push.

    It samples in a thread of its own, and a push waits for the samples that are under way.
    """

    def __init__(self, config: Config, draws: Draws, decode: Decode) -> None:
        self.decoder = Decoder(read_hf_config(config.served_hf))
        self.samples, self.draws, self.decode = config.rollout.samples_per_prompt, draws, decode
        self.version = -1
        self.thread = LoopThread()

    def push(self, named_tensors: WeightStream, version: int) -> SyncReport:
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
    ) -> tuple[list[list[Rollout]], Sums]:
        """Whole groups, in the order of `prompts`; it is over too soon to be stopped."""
        samples = samples or self.samples
        completions = sample_groups(self.decoder, prompts, samples, epoch, self.version, self.draws)
        groups = [self._judged(p, epoch, group) for p, group in zip(prompts, completions, strict=True)]
        for group in groups:
            keep(group)
        return groups, {}

    def _judged(self, prompt: Prompt, epoch: int, group: list[Completion]) -> list[Rollout]:
        texts = self.decode([completion.tokens.tolist() for completion in group])
        rewards = [score(text, prompt.label) for text in texts]
        return rollouts_of(prompt, epoch, group, [(reward, reward == 1.0) for reward in rewards])

    async def hold(self, *, until_quiet: bool) -> None:
        """The thread that hears this samples nothing any more."""

    async def use(self, version: int) -> None:
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
    decode: Decode

    def close(self) -> None:
        """End the sampler's thread."""
        assert self.trainer.source is not None
        self.trainer.source.close()

    def evaluate(self) -> dict[str, float]:
        """Of every model, greedily: the share of the held-out items it gets right, and of problems without a
        wrong one."""
        limit = self.trainer.config.evaluation.max_new_tokens
        prompts, found = [prompt.tokens for prompt in self.heldout], {}
        for name, model in self.trainer.state.models.items():
            decoder = Decoder(model.family.hf_config)
            decoder.load(export(model))
            texts = self.decode(greedy(decoder, prompts, max_new_tokens=limit, stop_ids=self.stop_ids))
            shares = [score(text, p.label) for text, p in zip(texts, self.heldout, strict=True)]
            found[f"eval/{name}_accuracy"] = sum(shares) / len(shares)
            found[f"eval/{name}_exact"] = sum(share == 1.0 for share in shares) / len(shares)
        return found


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
    return Testbed(trainer, heldout.prompts, stop_ids, decode)


def model_files(config: Config) -> list[Path]:
    """What the run starts from, beside code and settings."""
    return [section.hf / "model.safetensors" for section in config.models.values()]
