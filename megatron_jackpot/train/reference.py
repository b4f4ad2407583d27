"""The frozen model that the policy is held near: loaded, scored once a step, known by what its files hold.

Shapes: M micro-batches of T tokens.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from megatron_jackpot.config import Config
from megatron_jackpot.config.model_folder import WEIGHTS
from megatron_jackpot.config.schema import REFERENCE
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
        self, model: MegatronModel, folder: Path, *, temperature: float, exact: bool, offload: bool
    ) -> None:
        self.model, self.folder, self.exact = model, folder, exact
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
        temperature = config.rollout.temperature
        exact = kl is not None and kl.exact
        return cls(model, folder, temperature=temperature, exact=exact, offload=section.offload)

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

    def state_dict(self) -> dict[str, str]:
        return {"path": str(self.folder), "sha256": self.digest}

    def check_state(self, saved: Mapping[str, str] | None) -> None:
        """Raises ValueError where a checkpoint was made with other weights; None knew of no reference."""
        if saved is not None and saved["sha256"] != self.digest:
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
