"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases where configured."""

import importlib
import importlib.util
import json
import logging
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_jackpot.run import formats
from megatron_jackpot.run.provenance import METRICS_FILE

log = logging.getLogger(__name__)

METRICS = {
    "reward/mean": "mean reward of the rollouts",
    "reward/correct": "share of correct rollouts",
    "reward/timed_out": "share of rewards that are 0 because they ran out of time",
    "reward/crashed": "share of rewards that are 0 because their worker ended or ran out of memory",
    "rollout/response_tokens": "mean length of a response",
    "rollout/truncated": "share of responses cut at rollout.max_new_tokens",
    "rollout/invalid_tokens": "share of tokens masked: log-prob not finite, or unknown",
    "rollout/unknown_tokens": "share of tokens masked from the first id on that one model has no row for",
    "rollout/failed_groups": "share of groups lost to failed requests",
    "rollout/equal_rewards": "share of groups whose rewards are all equal, so that they teach nothing",
    "rollout/tokens_per_s": "response tokens per second in which servers are asked for any",
    "train/tokens": "prompt and response tokens trained on",
    "jackpot/acceptance": "share of tokens accepted by the draw",
    "jackpot/acceptance_expected": "mean acceptance probability",
    "jackpot/z": "mean normaliser Z, after kappa",
    "jackpot/z_topk": "mean Z over the candidates, before kappa",
    "jackpot/z_p05": "5% quantile of Z",
    "jackpot/kappa": "factor that calibrates Z to the acceptance",
    "jackpot/cap_fraction": "share of kept tokens whose weight was lowered by c1",
    "jackpot/kl_after": "KL(target || law after rejection), over the candidates",
    "weight/ess": "effective sample size of the weights as a share of the tokens",
    "rejected/correct": "share of tokens of correct responses that are removed",
    "rejected/wrong": "share of tokens of wrong responses that are removed",
    "objective/clip_fraction": "share of tokens whose gradient the policy's objective removes",
    "kl/target_server": "KL(target || server), over the candidates: a lower bound",
    "kl/server_policy_k3": "k3 estimate of KL(server || policy)",
    "kl/server_actor_k3": "k3 estimate of KL(server || actor): disagreement of the two engines",
    "gap/actor_server": "mean |log p_actor - log q| on sampled tokens",
    "loss/policy": "policy loss",
    "loss/actor": "whole loss of the actor",
    "loss/actor_rl": "PPO loss of the actor",
    "loss/distill": "distillation loss of the actor, before its weight",
    "grad_norm/policy": "gradient norm of the policy before clipping",
    "grad_norm/actor": "gradient norm of the actor before clipping",
    "lr/policy": "learning rate of the policy",
    "lr/actor": "learning rate of the actor",
    "eval/policy_accuracy": "share of held-out problems that the policy solves, greedily",
    "eval/actor_accuracy": "share of held-out problems that the actor solves, greedily",
    "eval/failed_rewards": "share of an evaluation's rewards that timed out or crashed",
    "probe/max": "largest |server logp - trainer logp| of the actor in a probe",
    "sync/version": "weight version the trainer sent",
    "sync/server_version": "weight version the servers report",
    "sync/seconds": "duration of the weight update",
    "time/rollout": "seconds of rollout",
    "time/make_room": "seconds until servers have lent their memory and optimizer state is back",
    "time/score": "seconds of scoring",
    "time/correct": "seconds of the correction",
    "time/update_policy": "seconds of the policy update",
    "time/update_actor": "seconds of the actor update",
    "time/sync": "seconds of export and sync",
    "time/step": "seconds of the whole step",
    "memory/trainer_gib": "GiB that the largest rank has held at most: of its GPU, else of the machine",
    "memory/server_gib": "GiB of weights, KV cache and graphs on the fullest GPU of the servers",
    "staleness/mean": "mean age of the tokens in weight versions",
    "idle/trainer": "share of the time in which the trainer waits for rollouts",
    "idle/servers": "share of the time in which servers are asked for none",
}
"""The names that tools and dashboards may rely on; a run may write others beside them."""

WANDB_ID_FILE = "wandb-id"
HELD_BACK_BYTES = 2**20
"""Rows that wait for a disk that refuses: those of hundreds of steps."""
Row = dict[str, Any]


class JsonLines:
    """Appends rows with a "step" to a file, one JSON object a line, each on disk before `write` returns.

    Rows that the disk refuses, as a full one does, are held back and written with the next one that it takes.
    Every line carries the format's number: lines are cut away at a resume, and read while others are written.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        """`resume_step` drops what an earlier process wrote for later steps; None keeps all of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _repair(path, resume_step)
        # What could not be written stays in the buffer, to the byte, and the next flush tries it again.
        self._file = open(path, "a", encoding="utf-8", buffering=HELD_BACK_BYTES)
        self._refused = False

    def write(self, row: Row) -> None:
        try:
            self._file.write(line_of(row))
            self._file.flush()
            self._refused = False
        except OSError as error:
            if not self._refused:
                log.warning(f"{self._file.name} lacks rows until the disk takes them again: {error}")
            self._refused = True

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Writes {"format": 1, "step": 3, "reward/mean": 0.25, ...} lines to folder/metrics.jsonl, from one
    process.

    A value that is not finite is null there, left out elsewhere, and counted in `num_nonfinite`.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        wandb_project: str | None,
        *,
        resume_step: int | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """`resume_step` drops what an earlier process wrote for later steps; None keeps all of it. `settings`
        are shown as the configuration of the run in Weights & Biases.

        Raises ValueError when a sink is asked for whose package is missing.
        """
        self.num_nonfinite = 0
        self._tensorboard = self._wandb = None
        _require("tensorboard", tensorboard, "logging.tensorboard = true", "logging.tensorboard=false")
        _require(
            "wandb", wandb_project, f"logging.wandb_project = {wandb_project!r}", "logging.wandb_project=null"
        )
        folder = Path(folder)
        self._rows = JsonLines(folder / METRICS_FILE, resume_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = None if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge_step)
        if wandb_project is not None:
            # Not an import: the package is nobody's requirement.
            self._wandb = importlib.import_module("wandb").init(
                project=wandb_project,
                dir=str(folder),
                name=folder.name,
                id=wandb_id(folder),
                resume="allow",
                config=dict(settings or {}),
                # A resumed run may have other settings than it began with.
                allow_val_change=True,
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if lost := sorted(values.keys() - finite.keys()):
            self.num_nonfinite += len(lost)
            log.warning(f"step {step}: not finite, {self.num_nonfinite} so far: {', '.join(lost)}")
        self._rows.write({"step": step, **{name: finite.get(name) for name in values}})
        if self._tensorboard is not None:
            try:
                for name, value in finite.items():
                    self._tensorboard.add_scalar(name, value, step)
                self._tensorboard.flush()
            except OSError as error:  # Its own thread has ended with it: this writer takes no more.
                self._tensorboard = None
                log.warning(f"TensorBoard has no steps from {step} on, until the run is resumed: {error}")
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        self._rows.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def wandb_id(folder: Path) -> str:
    """The id of the folder's run in Weights & Biases, made once: what goes on here goes on there."""
    path = folder / WANDB_ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, or of the one in a run folder, in file order, without their format.

    A last line without its end, as a killed run leaves it, is passed over; other bad lines, and those of
    another format, raise ValueError.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if isinstance(row, dict):
            formats.check_format("metrics", row.pop(formats.FIELD, 0), f"{path}, line {number},")
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: not an object with an integer 'step'.")
        rows.append(row)
    return rows


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, without nulls; the last value written for a step counts."""
    values = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    return sorted(values), [values[step] for step in sorted(values)]


def _repair(path: Path, resume_step: int | None) -> None:
    """Cut an unfinished last line, and rows after `resume_step`, before new rows are appended."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if resume_step is None or row["step"] <= resume_step]
    partial = path.with_suffix(".jsonl.partial")
    partial.write_text("".join(map(line_of, rows)), encoding="utf-8")
    partial.replace(path)


def line_of(row: Row) -> str:
    """As it stands in a file, with the number of the format."""
    return json.dumps({formats.FIELD: formats.current("metrics"), **row}) + "\n"


def _require(package: str, wanted: object, setting: str, remedy: str) -> None:
    if wanted and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{setting} needs the {package} package. Install it (pip install {package}) or set {remedy}."
        )
