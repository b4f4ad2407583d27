"""Who runs where on a cluster: nodes x GPUs against tp x pp x cp x dp and the servers. No torch import."""

from megatron_jackpot.config import Config


def trainer_procs(config: Config) -> int:
    """Training processes on each of their nodes. Raises ValueError with the arithmetic where GPUs do not
    suffice."""
    cluster, servers = config.cluster, config.servers
    colocated = cluster.layout == "colocated"
    on_node = servers.num * servers.tp
    if cluster.gpus_per_node == 0:
        if cluster.trainer_procs is None:
            raise ValueError(
                "cluster.gpus_per_node = 0 has no GPUs to count. Set cluster.trainer_procs to the training "
                "processes "
                "of a node."
            )
        return cluster.trainer_procs
    if not config.servers.urls and on_node > cluster.gpus_per_node - colocated:
        kept = " and one must be left for training" if colocated else ""
        raise ValueError(
            f"servers.num * servers.tp = {servers.num} * {servers.tp} = {on_node} GPUs for servers, but a "
            "node has "
            f"cluster.gpus_per_node = {cluster.gpus_per_node}{kept}. Lower one, or raise the other."
        )
    free = cluster.gpus_per_node - (on_node if colocated and not config.servers.urls else 0)
    procs = cluster.trainer_procs or free
    if procs > free:
        taken = f" - {on_node} of servers" if colocated else ""
        raise ValueError(
            f"cluster.trainer_procs = {procs} exceeds the {cluster.gpus_per_node} GPUs of a node{taken} = "
            f"{free}. "
            f"Set cluster.trainer_procs={free}."
        )
    return procs


def expected_processes(config: Config) -> tuple[int, str]:
    """Training processes of a run of which nobody says how many, and why so many: those of the cluster
    section, or, where that is at its defaults, of `launch` on one machine. Raises ValueError."""
    if config.cluster == type(config.cluster)():
        p = config.parallel
        return p.tp * p.pp * p.cp, "as `launch` starts without --nproc; there is no cluster section"
    return training_processes(config), "of the cluster section"


def training_processes(config: Config) -> int:
    """All of them, checked against the mesh. Raises ValueError with the arithmetic for an impossible
    layout."""
    nodes, procs = config.cluster.num_trainer_nodes, trainer_procs(config)
    total = nodes * procs
    try:
        data_parallel(config, total)
    except ValueError as error:
        raise ValueError(f"{nodes} training nodes x {procs} processes = {total}. {error}") from error
    return total


def data_parallel(config: Config, gpus: int) -> int:
    """dp = gpus / (tp pp cp). Raises ValueError with the arithmetic where it does not come out."""
    p = config.parallel
    model = p.tp * p.pp * p.cp
    if gpus < 1 or gpus % model:
        lower, upper = gpus // model * model, (gpus // model + 1) * model
        raise ValueError(
            f"{gpus} training processes are no multiple of parallel.tp * pp * cp = {p.tp} * {p.pp} * {p.cp} "
            "= "
            f"{model}. Use {f'{lower} or ' if lower > 0 else ''}{upper} of them, or change parallel."
        )
    dp = gpus // model
    if config.rollout.prompts_per_step < dp:
        raise ValueError(
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step} is less than dp = {gpus} / "
            f"{model} = {dp}: "
            "every data-parallel rank needs a prompt of its own. Raise it, tp or pp, or use fewer GPUs."
        )
    return dp
