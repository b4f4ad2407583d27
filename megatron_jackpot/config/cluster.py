"""A job on a cluster: nodes, who runs where, limits, container. Of `launch --slurm` and `plan`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from megatron_jackpot.config.base import Section

Word = Annotated[str, StringConstraints(pattern=r"^[\w.,:@/+=%\[\]-]+$")]
"""One word of a #SBATCH line: nothing a shell or Slurm would read as two."""


class Cluster(Section):
    layout: Literal["colocated", "disaggregated"] = "colocated"
    """colocated: ranks on all nodes, servers beside them; disaggregated: the last server_nodes hold only
    servers."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of the job, those of the servers included."""
    server_nodes: int | None = Field(default=None, ge=1)
    """Nodes with servers.num servers each; null is every node when colocated, one when disaggregated."""
    gpus_per_node: int = Field(default=8, ge=0)
    """GPUs of a node; servers take theirs from the end. 0 is a cluster of CPUs."""
    trainer_procs: int | None = Field(default=None, ge=1)
    """Training processes on each of their nodes; null is one for every GPU that no server takes."""
    gpu_memory_gib: float = Field(default=80, gt=0)
    """Memory of one GPU, against which a job is refused before it is submitted."""
    minutes: int = Field(default=240, ge=1)
    """Time limit of the job; the run goes on in the requeued job."""
    signal_s: int = Field(default=300, ge=1, le=65535)
    """Seconds before the limit at which the job is told to save and requeue itself."""
    max_requeues: int = Field(default=100, ge=0)
    """How often a job may requeue itself."""
    seeds: tuple[int, ...] = ()
    """An array job with one run for each seed, in run.folder/seed-N; empty is one run with run.seed."""
    partition: Word | None = None
    """Slurm partition."""
    account: Word | None = None
    """Slurm account."""
    sbatch: tuple[Word, ...] = ()
    """More #SBATCH options, for example --qos=high or --exclude=node7."""
    interface: Word | None = None
    """Network interface of NCCL, gloo and the servers' addresses, for example ib0; null follows the default
    route."""
    runtime: Literal["bare", "pyxis", "apptainer"] = "bare"
    """What every step runs in: this environment, enroot through pyxis, or apptainer."""
    image: str | None = Field(default=None, pattern=r"^[^\s'\"]+$")
    """Container image of the steps, as the runtime spells it."""
    mounts: tuple[str, ...] = ()
    """host:container folders that a container sees; the run's and the models' folders must be among them."""
    setup: Path | None = None
    """Bash file that each bare step sources first, for example tools/env.sh."""

    @property
    def num_server_nodes(self) -> int:
        if self.server_nodes is not None:
            return self.server_nodes
        return self.nodes if self.layout == "colocated" else 1

    @property
    def num_trainer_nodes(self) -> int:
        return self.nodes if self.layout == "colocated" else self.nodes - self.num_server_nodes

    @model_validator(mode="after")
    def _fields_agree(self) -> "Cluster":
        if self.num_trainer_nodes < 1 or self.num_server_nodes > self.nodes:
            raise ValueError(
                f"cluster.layout = '{self.layout}' with cluster.nodes = {self.nodes} and "
                f"{self.num_server_nodes} of "
                f"servers leaves {self.nodes - self.num_server_nodes} for training. Use more nodes, fewer "
                "cluster.server_nodes, or cluster.layout=colocated."
            )
        if (self.runtime == "bare") != (self.image is None):
            raise ValueError(
                f"cluster.runtime = '{self.runtime}' with cluster.image = {self.image}: an image goes with "
                "pyxis or "
                "apptainer, and they need one. Set both or neither."
            )
        if any(":" not in mount or any(c in mount for c in "\n'\", ") for mount in self.mounts):
            raise ValueError(
                f"cluster.mounts = {list(self.mounts)} must be HOST:CONTAINER folders, no spaces."
            )
        if len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"cluster.seeds = {list(self.seeds)} must be different numbers from 0 on.")
        return self
