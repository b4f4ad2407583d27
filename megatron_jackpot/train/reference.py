"""The model that the policy is held near: loaded, scored once a step, known by what its files hold; or
refreshed from the policy, and then its weights are a checkpoint's.

Shapes: M micro-batches of T tokens.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from megatron_jackpot.config import Config
from megatron_jackpot.config.model_folder import WEIGHTS
from megatron_jackpot.config.schema import REFERENCE
from megatron_jackpot.models.checkpoint import load_frozen
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import Family
from megatron_jackpot.models.frozen import HostWeights
from megatron_jackpot.models.head import FrozenHead
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.divergence import vocab_parallel_kl
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.parallel.vocab import vocab_parallel_logp
from megatron_jackpot.records import Batch
from megatron_jackpot.train.digests import digests


class Reference:
    """No gradients, no optimizer, no buffers: the weights, and [M, T] log-probs of a step."""

    def __init__(
        self,
        model: MegatronModel,
        folder: Path,
        *,
        temperature: float,
        exact: bool,
        offload: bool,
        refresh_every: int | None,
    ) -> None:
        self.model, self.folder, self.exact, self.refresh_every = model, folder, exact, refresh_every
        self.vocab = model.vocab(temperature)
        self.digest = content_digest(folder)
        self._host = HostWeights(model) if offload else None

    @classmethod
    def load(
        cls, config: Config, mesh: Mesh, families: dict[str, Family], padded_vocab: int
    ) -> "Reference | None":
        """That of the configuration; every rank calls it."""
        section, kl = config.policy.reference, config.algorithm.reference_kl
        if section is None:
            return None
        folder = section.hf or config.policy.hf
        model = MegatronModel.load(
            "reference",
            families.get(REFERENCE, families["policy"]),
            folder,
            mesh=mesh,
            parallel=config.parallel,
            # What is kept in fp8 is a class of its own, which cannot lie in host memory.
            precision=config.precision.model_copy(update={"fp8_param": False}),
            padded_vocab=padded_vocab,
            frozen=True,
        )
        return cls(
            model,
            folder,
            temperature=config.rollout.temperature,
            exact=kl is not None and kl.exact,
            offload=section.offload,
            refresh_every=section.refresh_every,
        )

    def score(self, batch: Batch, policy_head: FrozenHead | None) -> dict[str, Tensor]:
        """The fields of Scores about the reference, [M, T]; none off the last pipeline stage.

        `policy_head` has the policy's logits of the same pass where the KL over the vocabulary is measured.
        """

        def read(logits_TV: Logits, m: int) -> dict[str, Tensor]:
            found = {"reference_logp_MT": vocab_parallel_logp(logits_TV, batch.labels_MT[m], self.vocab)}
            if policy_head is not None:
                common = policy_head.common(self.vocab)
                kl_T = vocab_parallel_kl(logits_TV, policy_head.logits(m), common, direction="forward")
                found["reference_kl_MT"] = kl_T
            return found

        with nullcontext() if self._host is None else self._host.on_device():
            return self.model.score(batch, read) or {}

    def after(self, num_steps: int, policy: MegatronModel) -> None:
        """Become the policy, where it is time; every rank calls it after every step."""
        if self.refresh_every is not None and num_steps % self.refresh_every == 0:
            self.become(policy)

    def become(self, policy: MegatronModel) -> None:
        """Hold the policy's weights of now; every rank calls it."""
        with torch.no_grad(), policy.fresh_parameters():
            weights = [parameter.data for chunk in policy.chunks for parameter in chunk.parameters()]
            if self._host is not None:
                self._host.take(weights)
                return
            own = [parameter for chunk in self.model.chunks for parameter in chunk.parameters()]
            for parameter, weight in zip(own, weights, strict=True):
                parameter.copy_(weight)

    def state_dict(self) -> dict[str, str | int | None]:
        return {"path": str(self.folder), "sha256": self.digest, "refresh_every": self.refresh_every}

    def load_state_dict(self, saved: Mapping[str, str | int | None] | None, weights: Path) -> None:
        """Go on as a checkpoint was made; `weights` is its folder with those of a refreshed reference. None
        knew of no reference: one that is refreshed is then to `become` the policy that was loaded.

        Raises ValueError where it was made with weights that are not here.
        """
        if saved is None:
            return
        if saved.get("refresh_every"):
            if self.refresh_every is None:
                raise ValueError(
                    "policy.reference.refresh_every is null, but the checkpoint's reference was refreshed "
                    f"every {saved['refresh_every']} steps: the KL would be one to another model. Set it, or "
                    "begin a new run."
                )
            load_frozen(self.model, weights)
        elif saved["sha256"] != self.digest:
            raise ValueError(
                f"policy.reference = {self.folder} holds other files than {saved['path']} did when the "
                "checkpoint was made: the KL would be one to another model. Set policy.reference.hf to a "
                "folder that holds the same, or begin a new run."
            )


def content_digest(folder: Path) -> str:
    """sha256 of configuration and weights, wherever the folder lies; every rank calls it."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    held = [path for path in files if path.name == "config.json" or path.name.endswith(WEIGHTS)]
    return hashlib.sha256(json.dumps(digests(folder, held), sort_keys=True).encode()).hexdigest()
