"""What the correction decided, token by token, for a few rollouts of some steps: RUN/tokens/step-000011.npz.

Shapes: S rollouts, N tokens of all of them one after another, prompts included.
"""

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from megatron_jackpot.config import Logging
from megatron_jackpot.records import Correction, Scores

FOLDER = "tokens"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRecord:
    """The sampled tokens of S rollouts and what became of each; a number of a prompt's token is 0."""

    step: int
    """The step that trained on them, from 1."""
    length_S: np.ndarray
    """int64, tokens of each rollout."""
    rollout_S3: np.ndarray
    """int64, (epoch, prompt id, sample)."""
    advantage_S: np.ndarray
    """float32."""
    correct_S: np.ndarray
    """bool."""
    token_N: np.ndarray
    """int64."""
    response_N: np.ndarray
    """bool, the server sampled it."""
    trained_N: np.ndarray
    """bool, it has a finite log-prob of the server."""
    keep_N: np.ndarray
    """bool, the correction keeps it."""
    weight_N: np.ndarray
    """float32, the factor of its loss."""
    target_logp_N: np.ndarray
    """float32, under what the correction aligns to: the policy."""
    server_logp_N: np.ndarray
    """float32, under the server: the proposal."""
    actor_logp_N: np.ndarray | None = None
    """float32, under the trainer's actor; None where the policy samples."""


class TokenLog:
    """Writes a record every `logging.tokens_every` steps, on the rank that is given `here`."""

    def __init__(self, run_folder: Path, config: Logging, *, here: bool) -> None:
        self.folder = Path(run_folder) / FOLDER
        self.every, self.num_rollouts = config.tokens_every, config.tokens_rollouts
        self.here = here
        self.last = 0

    def note(self, step: int, scores: Scores, correction: Correction) -> None:
        """Record rollouts of the step's first mini-batch, spread evenly. A disk that refuses is reported, not
        raised."""
        if not self.here or self.every is None or step == self.last or (step - 1) % self.every:
            return
        self.last = step
        record = record_of(step, scores, correction, self.num_rollouts)
        try:
            save(self.folder / f"step-{step:06d}.npz", record)
        except OSError as error:
            log.warning(f"the tokens of step {step} were not recorded: {error}")


def record_of(step: int, scores: Scores, correction: Correction, num_rollouts: int) -> TokenRecord:
    """`num_rollouts` rollouts, evenly among those of a mini-batch.

    A decision stands where its token is the label; here it moves to the token itself.
    """
    batch = scores.batch
    segment_T = batch.segment_MT.flatten().cpu().numpy()
    segments = np.unique(segment_T[segment_T >= 0])
    few = np.linspace(0, len(segments) - 1, min(num_rollouts, len(segments))).round().astype(int)
    places = [np.flatnonzero(segment_T == segment) for segment in segments[few]]
    order_N = np.concatenate(places) if places else np.zeros(0, np.int64)
    first_N = np.concatenate([np.arange(len(p)) == 0 for p in places]) if places else np.zeros(0, bool)

    def taken(tensor_MT: Tensor) -> np.ndarray:
        return tensor_MT.flatten(0, 1).cpu().numpy()[order_N]

    def moved(tensor_MT: Tensor) -> np.ndarray:
        """A label belongs to the next token of its sequence; the first token is nobody's label."""
        return np.where(first_N, 0, np.roll(taken(tensor_MT), 1)).astype(taken(tensor_MT).dtype)

    trained_N = moved(batch.mask_MT)

    def logp(tensor_MT: Tensor) -> np.ndarray:
        return np.where(trained_N, moved(tensor_MT.float()), 0)

    starts = np.flatnonzero(first_N)
    correct_T = batch.correct_MT.flatten().cpu().numpy()  # True where a token of the response is the label.
    return TokenRecord(
        step=step,
        length_S=np.array([len(p) for p in places], np.int64),
        rollout_S3=taken(batch.rollout_id_MT3)[starts],
        advantage_S=np.array(
            [_of_response(batch.advantage_MT, batch.mask_MT, p) for p in places], np.float32
        ),
        correct_S=np.array([bool(correct_T[p].any()) for p in places], bool),
        token_N=taken(batch.tokens_MT),
        response_N=~first_N & (np.roll(taken(batch.weight_version_MT), 1) >= 0),
        trained_N=trained_N,
        keep_N=moved(correction.keep_MT) & trained_N,
        weight_N=np.where(trained_N, moved(correction.weight_MT.float()), 0),
        target_logp_N=logp(scores.target_logp_MT),
        server_logp_N=logp(batch.server_logp_MT),
        actor_logp_N=None if scores.actor_logp_MT is None else logp(scores.actor_logp_MT),
    )


def _of_response(advantage_MT: Tensor, mask_MT: Tensor, place: np.ndarray) -> float:
    advantage_N, mask_N = (tensor.flatten().cpu().numpy()[place] for tensor in (advantage_MT, mask_MT))
    values = advantage_N[mask_N]
    return float(values[0]) if len(values) else 0.0


def save(path: Path, record: TokenRecord) -> None:
    """Whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **{name: v for name, v in vars(record).items() if v is not None})
    partial.replace(path)


def load(path: Path) -> TokenRecord:
    """Raises ValueError for a file that is not what `save` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return TokenRecord(**{**arrays, "step": int(arrays["step"])})
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no record of tokens: {error}. Delete it.") from error


def record_files(run_folder: Path) -> list[Path]:
    """Of all of a run's records, by step."""
    return sorted((Path(run_folder) / FOLDER).glob("step-*.npz"))
