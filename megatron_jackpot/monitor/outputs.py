"""What the main rank writes of a run: metrics, the account of prompts, some answers, progress."""

import contextlib
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from megatron_jackpot.config import Config
from megatron_jackpot.monitor.console import PROGRESS_FILE, StepLogger
from megatron_jackpot.monitor.equal_rewards import EqualRewards
from megatron_jackpot.monitor.metrics import JsonLines, MetricsWriter, Row
from megatron_jackpot.monitor.prometheus import PrometheusEndpoint

PROMPTS_FILE = "prompts.jsonl"
SAMPLES_FILE = "samples.jsonl"


class Outputs:
    """Opens every sink that the configuration asks for; as a context, for its end."""

    def __init__(self, config: Config, *, resume_step: int | None) -> None:
        """What was written for steps after `resume_step` is dropped; None keeps all.

        Raises ValueError when a sink is asked for whose package is missing.
        """
        logging, folder = config.logging, config.run.folder
        with contextlib.ExitStack() as opened:
            enter = opened.enter_context
            writer = enter(
                MetricsWriter(
                    folder,
                    logging.tensorboard,
                    logging.wandb_project,
                    resume_step=resume_step,
                    settings=config.model_dump(mode="json"),
                )
            )
            self._prompts = JsonLines(folder / PROMPTS_FILE, resume_step)
            opened.callback(self._prompts.close)
            self._samples = JsonLines(folder / SAMPLES_FILE, resume_step)
            opened.callback(self._samples.close)
            progress = enter(
                StepLogger(
                    config.run.steps,
                    progress=logging.progress,
                    first_step=max(resume_step or 0, 0),
                    file=folder / PROGRESS_FILE,
                )
            )
            self._sinks = [writer.write, progress.log, EqualRewards(config).look]
            if logging.prometheus_port is not None:
                endpoint = PrometheusEndpoint(logging.prometheus_host, logging.prometheus_port)
                self._sinks.append(enter(endpoint).write)
            self._opened = opened.pop_all()

    def report(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self._sinks:
            sink(step, metrics)

    def account(self, step: int, account: Row) -> None:
        """What became of a step's prompts, as one line."""
        self._prompts.write({"step": step, **account})

    def keep(self, step: int, samples: Iterable[Row]) -> None:
        """Answers in words, a line each, for the report."""
        for sample in samples:
            self._samples.write({"step": step, **sample})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._opened.__exit__(kind, error, trace)
