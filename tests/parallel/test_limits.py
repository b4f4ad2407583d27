"""Where servers do not answer, the leader says what it waited for, on every rank, before anyone gives up on
it and before the watchdog ends it."""

import ast
import asyncio
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.rollout.collect import Interrupted
from megatron_jackpot.rollout.outcome import StopRun
from megatron_jackpot.rollout.pipeline import Pipeline
from megatron_jackpot.run import limits
from megatron_jackpot.run.limits import behind, watched
from megatron_jackpot.train import evaluation as evaluation_module
from megatron_jackpot.train.evaluation import Evaluator
from megatron_jackpot.train.probe import Prober
from tests.parallel.layouts import NUM_PROMPTS, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import ScriptedSource
from tests.tiny import rollout

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_jackpot"
LIMIT_S, MARGIN_S = 1.5, 4.0
PROMPTS = [rollout(p, 0).prompt for p in range(NUM_PROMPTS)]


class Silent(ScriptedSource):
    """Its servers never answer."""

    async def collect(self, epoch, prompts, **options):
        await asyncio.sleep(600)

    def answers(self, prompts, max_new_tokens, *, samples, temperature, stop):
        return self.thread.wait(asyncio.sleep(600), LIMIT_S, f"answers to {len(prompts)} prompts")


class Stopped(ScriptedSource):
    """It hears a stop while it waits; `aside` notes how it was asked."""

    aside = False

    async def collect(self, epoch, prompts, *, samples, stop, aside):
        self.aside = aside
        raise Interrupted(stop(), [], {})

    def answers(self, prompts, max_new_tokens, *, samples, temperature, stop):
        raise Interrupted(stop(), [], {})


def _seen(call) -> tuple[str, float]:
    began = time.monotonic()
    with pytest.raises((TimeoutError, OSError, StopRun)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}", time.monotonic() - began


def _silent(rank: int, world: int, folder: str) -> dict[str, tuple[str, float]]:
    """What each wait ends with on this rank, of which only the first is a leader."""
    limits.MARGIN_S = MARGIN_S
    config = make_config(Layout(tp=2), Path(folder))
    run = config.run.model_copy(update={"phase_timeout_s": LIMIT_S})
    evaluation = config.evaluation.model_copy(update={"policy": "off"})
    # A request's own limit says nothing of how long a leader may be at work.
    rollouts = config.rollout.model_copy(update={"request_timeout_s": 0.05})
    config = config.model_copy(update={"run": run, "evaluation": evaluation, "rollout": rollouts})
    mesh = init_mesh(config.parallel, 5)
    source = Silent() if mesh.is_leader else None
    pipeline = Pipeline(mesh, config.rollout, source, lambda: None, {}, limit_s=LIMIT_S)
    loader = PromptLoader(PROMPTS, NUM_PROMPTS, mesh.dp_rank, mesh.dp, 5)
    pipeline.start(1, loader if mesh.is_leader else None)
    served = SimpleNamespace(name="actor")
    state = SimpleNamespace(mesh=mesh, served=served, models={}, num_steps=0, num_probes=0)
    probe = Prober(config, state, None, source, PROMPTS)
    sets = {"": PROMPTS, "hard": PROMPTS}
    evaluate = Evaluator(config, state, source, sets, stop_ids=(), packing_tokens=8)
    seen = {
        "take": _seen(lambda: pipeline.take(1, loader if mesh.is_leader else None, lambda: None)),
        "probe": _seen(probe),
        "evaluate": _seen(evaluate),
    }
    stopped = Stopped() if mesh.is_leader else None
    # The other rank has not heard of it.
    heard = dict(stop=lambda: "SIGTERM" if mesh.is_leader else None)
    seen["a probe that is stopped"] = _seen(Prober(config, state, None, stopped, PROMPTS, **heard))
    evaluate = Evaluator(config, state, stopped, sets, stop_ids=(), packing_tokens=8, **heard)
    seen["an evaluation that is stopped"] = _seen(evaluate)
    whole = config.model_copy(update={"evaluation": evaluation.model_copy(update={"policy": "recompute"})})
    state.models = {"policy": SimpleNamespace(vocab=lambda: None, fresh_parameters=nullcontext)}
    recompute = Evaluator(whole, state, source, sets, stop_ids=(), packing_tokens=8, **heard)
    evaluation_module.greedy = lambda *given, each, **options: each()
    seen["a recomputation that is stopped"] = _seen(recompute)
    for one in (source, stopped):
        if one is not None:
            one.close()
    assert stopped is None or stopped.aside
    destroy_mesh()
    return seen


@pytest.fixture(scope="module")
def ended(folder: Path) -> list[dict[str, tuple[str, float]]]:
    return run_ranks(_silent, 2, 60, str(folder))


def test_a_stop_that_a_leader_hears_in_a_probe_or_an_evaluation_is_every_ranks(ended) -> None:
    for rank in ended:
        for what in ("a probe", "an evaluation", "a recomputation"):
            assert rank[f"{what} that is stopped"][0] == "StopRun: "


def test_what_a_leader_waited_for_is_said_on_every_rank_that_waits_for_it(ended) -> None:
    leader, other = ended
    said = {
        "take": "for the rollouts of step 1 (run.phase_timeout_s).",
        "probe": "for the completions of a probe.",
        "evaluate": f"for answers to {NUM_PROMPTS} prompts.",
    }
    for name, what in said.items():
        assert leader[name][0] == f"TimeoutError: Waited {LIMIT_S:g} s {what}"
        assert other[name][0] == f"OSError: rank 0: TimeoutError: Waited {LIMIT_S:g} s {what}"
        assert other[name][1] < LIMIT_S + MARGIN_S


def _step(rank: int, world: int, folder: str, run: str) -> str:
    """What a step ends with that has been at work for almost its limit when it begins to wait."""
    limits.MARGIN_S = MARGIN_S
    config = make_config(Layout(), Path(folder))
    own = config.run.model_copy(update={"phase_timeout_s": LIMIT_S, "folder": Path(run)})
    trainer = load_trainer(config.model_copy(update={"run": own}))
    trainer.state.loader = PromptLoader(PROMPTS, NUM_PROMPTS, 0, 1, 5)
    trainer.source = trainer.pipeline.source = source = Silent()
    start = trainer.pipeline.start
    trainer.pipeline.start = lambda *given: (start(*given), time.sleep(0.9 * LIMIT_S))
    said, _ = _seen(trainer.step)
    source.close()
    destroy_mesh()
    return said


def test_the_watchdog_of_a_step_leaves_the_last_word_to_what_waits_in_it(folder, tmp_path) -> None:
    (said,) = run_ranks(_step, 1, 60, str(folder), str(tmp_path))
    assert said == f"TimeoutError: Waited {LIMIT_S:g} s for the rollouts of step 1 (run.phase_timeout_s)."
    assert not list(tmp_path.glob("stacks-*"))


def waits() -> list[tuple[str, str]]:
    """(file:line, limit) of every wait for leaders, and for the main rank in a push."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "wait_for_leaders":
                found.append((f"{path.name}:{node.lineno}", ast.unparse(node.args[1])))
            if name == "WeightStream":
                (limit,) = (word.value for word in node.keywords if word.arg == "timeout_s")
                found.append((f"{path.name}:{node.lineno}", ast.unparse(limit)))
    return found


def test_a_rank_that_waits_for_another_gives_up_behind_it_and_the_watchdog_last() -> None:
    found = waits()
    assert len(found) > 3 and all(limit.startswith("behind(") for _, limit in found), found
    assert 5 < behind(5) < watched(5)
    # Of two sets the servers' answers, and verdicts on those of two models.
    assert limits.evaluation_s(10, 2, 2) == 2 * (10 + 2 * 10)
