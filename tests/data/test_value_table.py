"""The table of V* for a_star_po: its formula, what it covers, how it is filled, and what is refused."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_jackpot.algorithm.objectives import AStarPO
from megatron_jackpot.config import Config, Method, parse_config
from megatron_jackpot.data.value_table import Source, ValueTable, optimal_value, source_of, table_path
from megatron_jackpot.records import Prompt
from megatron_jackpot.train import values
from megatron_jackpot.train.values import fill, make_values, of_reference

PROMPTS = [Prompt(number, (1, number), {"answer": str(number)}) for number in range(7)]
SOURCE = Source(
    reference="9f86",
    samples=4,
    beta=0.5,
    temperature=0.9,
    max_new_tokens=3,
    rewards={"data.reward": "exact x 1"},
)


class Judge:
    """An answer to prompt n is right where its number is below n; of (answer, prompt) in `failing` the reward
    fails."""

    def __init__(self, failing: Collection[tuple[int, int]] = ()) -> None:
        self.asked: list[int] = []
        self.failing = failing

    def answers(
        self, prompts: Sequence[Prompt], max_new_tokens: int, *, samples: int, temperature: float
    ) -> list[list[list[int]]]:
        assert (max_new_tokens, temperature) == (3, 0.9)
        self.asked += [prompt.id for prompt in prompts]
        return [[[i] for i in range(samples)] for _ in prompts]

    def rewards(self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> list[float | None]:
        both = zip((answer[0] for answer in answers), prompts, strict=True)
        return [None if (a, p.id) in self.failing else float(a < p.id) for a, p in both]


def test_v_star_is_between_the_mean_and_the_largest_reward_and_low_of_few_samples() -> None:
    rewards = [1.0, 0.0, 0.0, 0.25]
    assert optimal_value(rewards, math.inf) == pytest.approx(1.25 / 4)
    assert optimal_value(rewards, 1e6) == pytest.approx(1.25 / 4, abs=1e-6)
    assert optimal_value(rewards, 1e-3) == pytest.approx(1.0, abs=2e-3)
    assert optimal_value([700.0, 0.0], 0.5) == pytest.approx(700 - 0.5 * math.log(2))
    # Enumerated, of 8 samples with beta = .5. The specification has .533 against .567, of a pass rate that it
    # does not name; the mean rises with it, and where the other is .567 to its last digit, from .3295 on, the
    # mean is .534 at least, or .535.
    beta = 0.5
    for p, low, full in ((0.3295, 0.5336, 0.5665), (0.33, 0.5342, 0.5671), (0.3304, 0.5346, 0.5675)):
        mean = sum(
            math.comb(8, c) * p**c * (1 - p) ** (8 - c) * optimal_value([1.0] * c + [0.0] * (8 - c), beta)
            for c in range(9)
        )
        exact = beta * math.log(1 - p + p * math.exp(1 / beta))
        assert mean == pytest.approx(low, abs=6e-5) and exact == pytest.approx(full, abs=6e-5)


def test_a_table_is_filled_in_parts_and_names_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "AT_ONCE", 3)
    path, judge = tmp_path / "new" / "values.json", Judge()
    table = ValueTable(source=SOURCE)
    fill(table, PROMPTS[:4], judge, path)
    held = ValueTable.read(path)
    assert held == table and judge.asked == [0, 1, 2, 3]
    want = [optimal_value([1.0] * min(n, 4) + [0.0] * (4 - min(n, 4)), 0.5) for n in range(4)]
    assert [held.values[n] for n in range(4)] == pytest.approx(want)
    held.check(PROMPTS[:4], path)
    others = [*PROMPTS[:3], replace(PROMPTS[3], tokens=(1, 99)), *PROMPTS[4:]]
    with pytest.raises(
        ValueError, match=r"no value for 4 of 7 prompts as they are: ids 3, 4, 5, 6\. Add them"
    ):
        held.check(others, path)
    fill(held, held.missing(PROMPTS), judge, path)
    assert judge.asked == [0, 1, 2, 3, 4, 5, 6]
    ValueTable.read(path).check(PROMPTS, path)


def test_an_answer_whose_reward_failed_is_left_out_and_a_prompt_of_such_alone_has_no_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of prompt 2 a right answer and a wrong one, of prompt 4 all: as rewards of 0 they would lower V*."""
    path, table = tmp_path / "values.json", ValueTable(source=SOURCE)
    with caplog.at_level("INFO"):
        fill(table, PROMPTS, Judge({(1, 2), (3, 2), *((i, 4) for i in range(4))}), path)
    held = ValueTable.read(path)
    assert held.values.keys() == {0, 1, 2, 3, 5, 6}
    assert held.values[2] == pytest.approx(optimal_value([1.0, 0.0], 0.5))
    assert "6 answers left out, as their rewards failed" in caplog.text
    with pytest.raises(ValueError, match=r"no value for 1 of 7 prompts as they are: ids 4\. Add them"):
        held.check(PROMPTS, path)
    fill(held, held.missing(PROMPTS), Judge(), path)
    assert ValueTable.read(path).values[4] == pytest.approx(optimal_value([1.0] * 4, 0.5))


def test_a_file_that_is_none_is_named_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    with pytest.raises(ValueError, match="is not there. Make it with `megatron-jackpot values CONFIG`"):
        ValueTable.read(path)
    for text in ("[]", "{", '{"source": {"x": 1}, "values": []}', '{"values": [[1, 2]]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be read: .* Delete it and make it anew"):
            ValueTable.read(path)


def config(tmp_path: Path, **objective: object) -> Config:
    return parse_config(
        dict(
            run=dict(folder=str(tmp_path / "run")),
            policy=dict(hf="p", reference=dict(hf="r")),
            actor=dict(hf="a"),
            data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=64, reward="exact"),
            rollout=dict(max_new_tokens=64, temperature=0.8, ahead=1, concurrency=7),
            servers=dict(quantization="fp8", max_total_tokens=99),
            algorithm=dict(
                objective=dict(name="a_star_po", values=str(tmp_path / "v.json")) | objective,
                correction="none",
                advantage="reward",
            ),
        )
    )


def test_servers_of_the_reference_are_asked_as_the_run_asks_its_own(tmp_path: Path) -> None:
    alone = of_reference(config(tmp_path), Path("r"))
    assert (alone.served, alone.served_hf, alone.actor) == ("policy", Path("r"), None)
    assert (alone.rollout.temperature, alone.rollout.max_new_tokens, alone.rollout.concurrency) == (
        0.8,
        64,
        7,
    )
    assert (alone.servers.quantization, alone.servers.max_total_tokens) == (None, 99)


def test_a_table_of_other_samples_is_refused_with_what_differs(tmp_path: Path) -> None:
    now = config(tmp_path)
    table = ValueTable(source=source_of(now, "9f86", samples=8, beta=0.5))
    table.check_source(now, "9f86", tmp_path)
    with pytest.raises(ValueError, match="reference = abcd, was 9f86"):
        table.check_source(now, "abcd", tmp_path)
    warmer = ValueTable(
        source=replace(table.source, temperature=1.0, rewards={"data.reward": "own:score x 1"})
    )
    with pytest.raises(ValueError, match="temperature = 0.8, was 1.0, rewards = .*exact.*, was .*own:score"):
        warmer.check_source(now, "9f86", tmp_path)


def test_the_table_is_looked_for_where_the_objective_says(tmp_path: Path) -> None:
    chosen = config(tmp_path)
    assert table_path(chosen) == tmp_path / "v.json"
    settings = {"name": "a_star_po"}
    plain = chosen.model_copy(
        update={"algorithm": chosen.algorithm.model_copy(update={"objective": Method(**settings)})}
    )
    assert table_path(plain) == Path(AStarPO().values)


def test_the_command_refuses_what_needs_no_table_before_anything_is_loaded(tmp_path: Path) -> None:
    chosen = config(tmp_path)
    plain = chosen.model_copy(
        update={"algorithm": chosen.algorithm.model_copy(update={"objective": chosen.actor.objective})}
    )
    with pytest.raises(ValueError, match="'ppo' asks for no table of values. Set algorithm.objective to"):
        make_values(plain, samples=8, beta=0.5)
    with pytest.raises(ValueError, match="--samples 0, --beta 0.5: must be >= 1 and > 0"):
        make_values(chosen, samples=0, beta=0.5)
    with pytest.raises(ValueError, match="beta = -1.0: must be finite and > 0"):
        make_values(config(tmp_path, beta=-1.0), samples=8, beta=0.5)
