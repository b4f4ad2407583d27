"""The records that travel between the stages of a step, and the one place where their shapes are written.

Shapes: R response tokens of one rollout, M micro-batches on this DP rank, T packed tokens per micro-batch
(the same for every micro-batch and rank), K top-k entries per token.
Row t of every packed field speaks about the prediction made at position t, that is about `labels_MT[m, t]`,
the token that follows `tokens_MT[m, t]` in its sequence; nothing is ever rolled across a sequence boundary.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One problem. Example: Prompt(id=7, tokens=(1, 42, 9), label={"answer": "12"})."""

    id: int
    """Position of the problem in its data set: stable across runs, epochs and DP sizes."""
    tokens: tuple[int, ...]
    """The prompt after the chat template, as token ids."""
    label: Any
    """What the reward needs (an answer string, a reasoning-gym entry, ...); never opened as a path."""


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt by a server, with the server's own log-probs as the proposal.

    Example: Rollout(prompt=Prompt(7, (1, 42, 9), "12"), epoch=0, sample=3, tokens=[17, 18, 2], ...).
    """

    prompt: Prompt
    epoch: int
    sample: int
    """Index of the completion within its group, 0 .. n-1."""
    tokens: np.ndarray
    """[R] int32, response tokens including the stop token when one was hit."""
    server_logp: np.ndarray
    """[R] float32, log-prob of each sampled token under the server, after temperature."""
    topk_ids: np.ndarray
    """[R, K] int32, the server's k most probable ids, best first; -1 is padding."""
    topk_logp: np.ndarray
    """[R, K] float32, their log-probs, -inf where the id is -1."""
    valid: np.ndarray
    """[R] bool, False where the server's sampled log-prob was not finite: counted, masked, never trained
    on."""
    weight_version: np.ndarray
    """[R] int32, version of the actor's weights that produced each token."""
    finish: str
    """"stop", "length" or "abort"."""
    reward: float = 0.0
    correct: bool = False
    advantage: float = 0.0
    """Computed over the whole group, before any rejection."""

    @property
    def key(self) -> tuple[int, int, int]:
        """(epoch, prompt id, sample): the identity of a rollout on any layout."""
        return self.epoch, self.prompt.id, self.sample

    @property
    def num_tokens(self) -> int:
        """Length of the sequence, prompt included."""
        return len(self.prompt.tokens) + len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """Packed micro-batches of one DP rank, identical on its tensor- and pipeline-parallel peers.

    Example: two rollouts of 5 and 3 tokens packed into T = 8 give tokens_MT of shape [1, 8],
    cu_seqlens[0] = [0, 5, 8] and segment_MT[0] = [0, 0, 0, 0, 0, 1, 1, 1].
    """

    tokens_MT: Tensor
    """int64, inputs."""
    labels_MT: Tensor
    """int64, the next token of the same sequence; 0 at the last position of a sequence and on padding."""
    mask_MT: Tensor
    """bool, True where the label is a response token with a finite server log-prob."""
    position_MT: Tensor
    """int64, position of the input token in its own sequence (rotary embedding, random draws)."""
    segment_MT: Tensor
    """int64, index of the sequence in this rank's mini-batch; padding has -1. A sequence never spans two
    rows."""
    rollout_id_MT3: Tensor
    """int64 [M, T, 3], (epoch, prompt id, sample); -1 on padding."""
    server_logp_MT: Tensor
    """float32, the proposal q at the sampled token; 0 outside the mask."""
    topk_ids_MTK: Tensor
    """int64, the server's top-k ids; -1 is padding."""
    topk_logp_MTK: Tensor
    """float32, their log-probs; -inf is padding."""
    weight_version_MT: Tensor
    """int64, version of the actor's weights behind each label; -1 outside the response."""
    advantage_MT: Tensor
    """float32, the rollout's advantage on each of its response tokens."""
    correct_MT: Tensor
    """bool, the rollout's verdict on each of its tokens."""
    cu_seqlens: tuple[Tensor, ...]
    """M int32 tensors [S_m + 1]: where each packed sequence starts; padding comes last, as sequences of its
    own."""
    num_minibatches: int = 1

    @property
    def num_microbatches(self) -> int:
        return self.tokens_MT.shape[0]

    def rows(self, start: int, stop: int) -> "Batch":
        """Micro-batches start .. stop - 1 as a batch with one mini-batch."""
        kept = {
            f.name: getattr(self, f.name)[start:stop] for f in fields(self) if f.name != "num_minibatches"
        }
        return Batch(**kept, num_minibatches=1)

    def split(self) -> "list[Batch]":
        """One batch per mini-batch, that is per optimizer step, in order."""
        size = self.num_microbatches // self.num_minibatches
        return [self.rows(i * size, (i + 1) * size) for i in range(self.num_minibatches)]

    def to(self, device: torch.device | str) -> "Batch":
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if f.type == "Tensor" or f.type is Tensor
        }
        return replace(self, **moved, cu_seqlens=tuple(c.to(device) for c in self.cu_seqlens))
