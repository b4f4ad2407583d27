"""The tables of `megatron-jackpot plan`."""

from rich.console import Console
from rich.table import Table

from megatron_jackpot.config import Config
from megatron_jackpot.plan.formulas import GIB, SERVER_SHARE, TRAINER_RESERVE_GIB, ModelPlan, Plan, make_plan
from megatron_jackpot.plan.microbatch import MEANS, Choice, advice, planned, with_tokens
from megatron_jackpot.plan.seconds import Assumptions, alone_seconds, shared_seconds, total_seconds


def show_plan(
    config: Config, gpus: int, assumed: Assumptions, console: Console | None = None, *, why: str = "as given"
) -> tuple[Plan, bool]:
    """Print the plan on `gpus` training GPUs, `why` so many, and what it assumes; it, and whether it fits.
    Raises ValueError."""
    console = console or Console()
    choice = planned(config, gpus) if config.packing.tokens == "auto" else None
    if choice is not None:
        config = with_tokens(config, choice.tokens)
    plan = make_plan(config, gpus, assumed.mean_tokens)
    for line in assumptions(plan, assumed, why):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in (memory_table(plan), step_table(plan, assumed), sharing_table(plan, assumed)):
        console.print(table)
    if choice is not None:
        if choice.sizes:
            console.print(sizes_table(choice))
        line = f"packing.tokens = auto: {choice.tokens}, {choice.why}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (advice(config, gpus) if choice is None else None, turns_advice(config)):
        if line is not None:
            console.print(f"advice: {line}", markup=False, highlight=False, soft_wrap=True)
    # Of `auto` what a start would say, which has no --mean-tokens.
    own = [] if choice is None or choice.trouble is None else [choice.trouble]
    troubles = own or memory_troubles(plan)
    for trouble in troubles:
        console.print(f"DOES NOT FIT: {trouble}", markup=False, highlight=False, soft_wrap=True)
    return plan, not troubles


def assumptions(plan: Plan, assumed: Assumptions, why: str) -> list[str]:
    """What the numbers rest on, and the option or key that changes it, a line each."""
    cluster, servers = plan.config.cluster, plan.config.servers
    memory = f"{cluster.gpu_memory_gib:g} GiB each (--gpu-memory)"
    length = "the longest allowed" if assumed.mean_tokens is None else "as given"
    return [
        f"assumed: {plan.gpus} training GPU(s) or processes, {why} (--gpus); "
        + ("a cluster of CPUs" if cluster.gpus_per_node == 0 else memory),
        f"assumed: {plan.num_servers} server(s) of servers.tp = {servers.tp} "
        + ("at servers.urls" if servers.urls else "beside them"),
        f"assumed: {plan.mean_tokens:g} tokens a sequence, {length} (--mean-tokens); acceptance "
        f"{assumed.acceptance:g} (--acceptance); {assumed.tflops:g} TFLOP/s (--tflops), "
        f"{assumed.tp_gbs:g} GB/s between tp peers (--tp-gbs)",
    ]


def turns_advice(config: Config) -> str | None:
    """A line where the GPUs of one side wait for the other's."""
    if config.rollout.ahead or config.servers.release_memory or config.cluster.gpus_per_node == 0:
        return None
    older = " rollout.max_staleness=1" * (config.rollout.max_staleness < 1)
    return (
        "rollout.ahead = 0: while servers sample, the training GPUs wait, and the other way round. "
        f"rollout.ahead=1{older} has the next step sampled while one is learned (docs/pipeline.md)."
    )


def memory_troubles(plan: Plan) -> list[str]:
    """What exceeds a GPU's memory, with the arithmetic and the remedy; nothing on a cluster of CPUs."""
    cluster = plan.config.cluster
    if cluster.gpus_per_node == 0:
        return []
    troubles = []
    room = cluster.gpu_memory_gib - TRAINER_RESERVE_GIB
    if plan.trainer_bytes > room * GIB:
        parts = " + ".join(
            f"{m.name} {m.weights / GIB:.1f} weights + {m.gradients / GIB:.1f} gradients + "
            f"{m.optimizer / GIB:.1f} optimizer"
            for m in plan.models
        )
        troubles.append(
            f"a training GPU needs {plan.trainer_bytes / GIB:.1f} GiB = {parts} + {_most_in_turns(plan)}, "
            f"but cluster.gpu_memory_gib = {cluster.gpu_memory_gib:g} - {TRAINER_RESERVE_GIB:g} reserve = "
            f"{room:g}. {_remedy(plan)}"
        )
    room = cluster.gpu_memory_gib * SERVER_SHARE
    if not plan.config.servers.urls and plan.server_bytes > room * GIB:
        troubles.append(
            f"a server's GPU needs {plan.server_bytes / GIB:.1f} GiB = {plan.server_weights / GIB:.1f} "
            "weights + "
            f"{plan.longest} tokens x {plan.server_kv_token / 2**10:.1f} KiB KV, but cluster.gpu_memory_gib "
            "= "
            f"{cluster.gpu_memory_gib:g} x {SERVER_SHARE:g} = {room:.1f}. Raise servers.tp or lower "
            "rollout.max_new_tokens."
        )
    return troubles


def _remedy(plan: Plan) -> str:
    most = max(m.transient for m in plan.models)
    if plan.scoring_bytes > most and plan.kept_bytes > plan.scoring_bytes - plan.kept_bytes:
        # A step's hidden states, however they are cut: see docs/planning.md.
        return "Raise nodes, lower rollout.prompts_per_step or rollout.ahead, or say --mean-tokens."
    return "Raise parallel.tp, parallel.pp or nodes, or lower packing.tokens."


def _most_in_turns(plan: Plan) -> str:
    """Terms of the fullest moment, beside what stays."""
    most = max(plan.models, key=lambda m: m.transient)
    if plan.scoring_bytes > most.transient:
        logits = plan.scoring_bytes - plan.kept_bytes
        return f"{plan.kept_bytes / GIB:.1f} hidden states kept for scores + {logits / GIB:.1f} logits"
    visiting = f"{most.visiting / GIB:.1f} visiting weights + " if most.visiting else ""
    return (
        f"{visiting}{most.activations / GIB:.1f} activations + {most.logits / GIB:.1f} logits ({most.name})"
    )


def memory_table(plan: Plan) -> Table:
    p = plan.config.parallel
    table = Table(title=f"GiB on one of {plan.gpus} training GPUs: tp {p.tp} x pp {p.pp} x dp {plan.dp}")
    for column in ("", *(m.name for m in plan.models), "together"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("parameters, whole model", *(f"{m.params:,}" for m in plan.models), "")
    table.add_row("parameters on this GPU", *(f"{m.params_per_gpu:,}" for m in plan.models), "")
    for kind in ("weights", "gradients", "optimizer"):
        values = [getattr(m, kind) for m in plan.models]
        table.add_row(kind, *(f"{v / GIB:.3f}" for v in (*values, sum(values))))
    for kind in (*(["visiting"] if any(m.visiting for m in plan.models) else []), "activations", "logits"):
        values = [getattr(m, kind) for m in plan.models]
        table.add_row(kind, *(f"{v / GIB:.3f}" for v in values), "in turns")
    if plan.kept_bytes:
        kept = f"{plan.kept_bytes / GIB:.3f}, in turns"
        table.add_row("hidden states kept for scores", *("" for _ in plan.models), kept)
    table.add_row("all", *("" for _ in plan.models), f"{plan.trainer_bytes / GIB:.3f}")
    served = {
        "server GPU: weights": plan.server_weights,
        "server GPU: KV of the longest": plan.longest * plan.server_kv_token,
    }
    if plan.ring_bytes:
        served = {"host: pushed weights, to be scored again": plan.ring_bytes, **served}
    if plan.reference_host:
        cells = (f"{plan.reference_host / GIB:.3f}" if m is plan.reference else "" for m in plan.models)
        table.add_row("host: the reference", *cells, "")
    for what, size in served.items():
        cells = (f"{size / GIB:.3f}" if m.name == plan.config.served else "" for m in plan.models)
        table.add_row(what, *cells, "")
    return table


def step_table(plan: Plan, assumed: Assumptions) -> Table:
    table = Table(title="One step, all GPUs together")
    table.add_column("")
    table.add_column("value", justify="right")
    trained = sum(m.flops for m in plan.models)
    received = plan.synced * plan.num_servers * plan.config.servers.tp
    rows = {
        "sequences": f"{plan.sequences:,}",
        f"tokens, {plan.mean_tokens:g} a sequence": f"{plan.tokens:,.0f}",
        "micro-batches per optimizer step and rank": f"{plan.microbatches}",
        **{f"FLOPs of the {m.name}, training": f"{m.flops:.3e}" for m in plan.models},
        "FLOPs of rollout": f"{plan.rollout_flops:.3e}",
        "bytes of a weight update": f"{plan.synced:,.0f}",
        "bytes received by all server ranks": f"{received:,.0f}",
        "bytes a GPU sends to its data-parallel peers": f"{sum(m.dp_bytes for m in plan.models):,.0f}",
        "training FLOPs per token": f"{trained / plan.tokens:.3e}",
        f"... per accepted token, acceptance {assumed.acceptance:g}": (
            f"{trained / plan.tokens / assumed.acceptance:.3e}"
        ),
        "policy FLOPs spent on rejected tokens": f"{(1 - assumed.acceptance) * plan.policy.flops:.3e}",
        f"seconds of training at {assumed.tflops:g} TFLOP/s": f"{total_seconds(plan, assumed):.2f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def sizes_table(choice: Choice) -> Table:
    """What `packing.tokens: auto` looked at: docs/planning.md says what the seconds are."""
    lengths = " / ".join(f"{mean:g}" for mean in MEANS)
    table = Table(title=f"Micro-batches of a rank, sequences {lengths} of the longest on average")
    for column in ("packing.tokens", "GiB", "micro-batches", "padding", "seconds", ""):
        table.add_column(column, justify="right")
    for size in choice.sizes:
        counts = " / ".join(map(str, size.microbatches))
        row = (f"{size.tokens}", f"{size.trainer_bytes / GIB:.1f}", counts, f"{size.padding:.1%}")
        table.add_row(*row, f"{size.seconds:.2f}", "taken" if size.tokens == choice.tokens else "")
    return table


def sharing_table(plan: Plan, assumed: Assumptions) -> Table:
    """What the policy's mesh costs each model, against one of pure data parallelism on the same GPUs."""
    table, models = Table(title="What sharing one mesh costs"), plan.models
    for column in ("", *(m.name for m in models)):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("training FLOPs, share of a step", *(f"{_share(plan, m):.1%}" for m in models))
    table.add_row("idle in the pipeline", *(f"{plan.bubble:.1%}" for _ in models))
    table.add_row("bytes to tensor-parallel peers", *(f"{m.tp_bytes:,.0f}" for m in models))
    table.add_row(
        "FLOPs per such byte",
        *(f"{m.flops / plan.gpus / m.tp_bytes:,.0f}" if m.tp_bytes else "-" for m in models),
    )
    table.add_row("seconds on this mesh", *(f"{shared_seconds(plan, m, assumed):.2f}" for m in models))
    table.add_row("seconds without tp and pp", *(f"{alone_seconds(plan, m, assumed):.2f}" for m in models))
    table.add_row(
        "ratio",
        *(f"{shared_seconds(plan, m, assumed) / alone_seconds(plan, m, assumed):.2f}" for m in models),
    )
    return table


def _share(plan: Plan, model: ModelPlan) -> float:
    return model.flops / sum(m.flops for m in plan.models)
