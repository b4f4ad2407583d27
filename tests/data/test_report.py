"""The record of tokens, and what the page gets of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_jackpot.config import Logging
from megatron_jackpot.monitor.report import rejections
from megatron_jackpot.monitor.report.rejections import NewestDecisions, decisions, most_rejected
from megatron_jackpot.monitor.report.tokens import chosen, token_view
from megatron_jackpot.monitor.token_log import TokenLog, TokenRecord, load, record_files, record_of, save
from megatron_jackpot.records import Batch, Correction, Scores

LENGTHS, PROMPTS = (5, 3, 4), (2, 1, 2)
"""Two rollouts in the first row of 9 tokens, one in the second; the rest is padding."""
ROWS, TOKENS = 2, 9


def packed() -> tuple[Scores, Correction, list[dict]]:
    """A mini-batch and what a reader expects of each rollout, made side by side."""
    rng = np.random.default_rng(0)
    size = ROWS * TOKENS
    flat = {name: np.zeros(size, np.float32) for name in ("server", "target", "actor", "weight", "advantage")}
    ints = {name: np.zeros(size, np.int64) for name in ("token", "label", "position")}
    ints |= {name: np.full(size, -1, np.int64) for name in ("segment", "version")}
    bools = {name: np.zeros(size, bool) for name in ("mask", "keep", "correct")}
    ids = np.full((size, 3), -1, np.int64)
    wanted, place = [], 0
    for segment, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        if segment == 2:
            place = TOKENS
        tokens = rng.integers(3, 60, length)
        own = dict(tokens=tokens, prompt=prompt, rows=[])
        for i in range(length):
            at = place + i
            ints["token"][at], ints["segment"][at], ints["position"][at] = tokens[i], segment, i
            ids[at] = (0, 10 + segment, segment)
            flat["advantage"][at] = segment - 1.0
            # The place before a token holds what is known of it.
            if prompt - 1 <= i < length - 1:
                ints["label"][at], ints["version"][at] = tokens[i + 1], 7
                bools["mask"][at] = (segment, i) != (2, 2)
                bools["keep"][at], bools["correct"][at] = rng.random() < 0.5, segment == 0
                for name in ("server", "target", "actor", "weight"):
                    flat[name][at] = rng.normal()
                own["rows"].append({k: v[at] for k, v in (flat | bools).items()})
        wanted.append(own)
        place += length
    return *tensors(flat | ints | bools, ids), wanted


def tensors(flat: dict[str, np.ndarray], ids: np.ndarray) -> tuple[Scores, Correction]:
    shaped = {k: torch.from_numpy(v).view(ROWS, TOKENS) for k, v in flat.items()}
    batch = Batch(
        tokens_MT=shaped["token"],
        labels_MT=shaped["label"],
        mask_MT=shaped["mask"],
        position_MT=shaped["position"],
        segment_MT=shaped["segment"],
        rollout_id_MT3=torch.from_numpy(ids).view(ROWS, TOKENS, 3),
        server_logp_MT=shaped["server"],
        topk_ids_MTK=torch.zeros(ROWS, TOKENS, 1, dtype=torch.int64),
        topk_logp_MTK=torch.zeros(ROWS, TOKENS, 1),
        weight_version_MT=shaped["version"],
        advantage_MT=shaped["advantage"],
        correct_MT=shaped["correct"],
        loss_weight_MT=torch.ones(ROWS, TOKENS),
        pruned_MP4=torch.zeros(ROWS, 0, 4, dtype=torch.int64),
        cu_seqlens=(),
        longest=(),
    )
    none_MTK = torch.zeros(ROWS, TOKENS, 1)
    scores = Scores(
        batch=batch,
        policy_logp_MT=shaped["target"] - 9,
        target_logp_MT=shaped["target"],
        actor_logp_MT=shaped["actor"],
        candidate_ids_MTK=none_MTK.long(),
        candidate_target_logp_MTK=none_MTK,
        candidate_server_logp_MTK=none_MTK,
        candidate_shared_MTK=none_MTK.bool(),
        step=0,
    )
    one = torch.ones([], dtype=torch.float64)
    correction = Correction(
        keep_MT=shaped["keep"],
        weight_MT=shaped["weight"],
        counted_MT=shaped["keep"].double(),
        accept_MT=shaped["keep"],
        kl=(one, one),
    )
    return scores, correction


def written(run: Path, *kept: TokenRecord) -> list[Path]:
    """The files of a run that has recorded `kept`, at steps 1, 2, ..."""
    for step, record in enumerate(kept, start=1):
        save(run / "tokens" / f"step-{step:06d}.npz", replace(record, step=step))
    return record_files(run)


def test_a_record_holds_each_decision_at_the_token_it_was_made_about() -> None:
    scores, correction, wanted = packed()
    record = record_of(4, scores, correction, 3)
    assert record.step == 4
    assert record.length_S.tolist() == list(LENGTHS)
    assert record.rollout_S3.tolist() == [[0, 10, 0], [0, 11, 1], [0, 12, 2]]
    assert record.advantage_S.tolist() == [-1, 0, 1]
    assert record.correct_S.tolist() == [True, False, False]
    start = 0
    for own in wanted:
        stop = start + len(own["tokens"])
        assert record.token_N[start:stop].tolist() == own["tokens"].tolist()
        response = [i >= own["prompt"] for i in range(len(own["tokens"]))]
        assert record.response_N[start:stop].tolist() == response
        for i, row in enumerate(own["rows"]):
            at = start + own["prompt"] + i
            assert record.trained_N[at] == row["mask"]
            assert record.keep_N[at] == (row["keep"] and row["mask"])
            for name in ("server_logp", "target_logp", "actor_logp", "weight"):
                expected = row[name.removesuffix("_logp")] if row["mask"] else 0
                assert getattr(record, f"{name}_N")[at] == expected
        start = stop
    assert not record.keep_N[~record.response_N].any()


def test_fewer_rollouts_are_spread_over_the_mini_batch() -> None:
    scores, correction, _ = packed()
    assert record_of(1, scores, correction, 2).rollout_S3[:, 1].tolist() == [10, 12]
    assert record_of(1, scores, correction, 9).rollout_S3[:, 1].tolist() == [10, 11, 12]


def test_the_log_writes_every_so_many_steps_once_and_only_here(tmp_path) -> None:
    scores, correction, _ = packed()
    for here in (False, True):
        log = TokenLog(tmp_path, Logging(tokens_every=3), here=here)
        for step in (1, 1, 2, 3, 4, 7):
            log.note(step, scores, correction)
        assert [load(path).step for path in record_files(tmp_path)] == ([1, 4, 7] if here else [])
    TokenLog(tmp_path / "none", Logging(tokens_every=None), here=True).note(1, scores, correction)
    assert not (tmp_path / "none").exists()


def test_a_disk_that_refuses_costs_the_record_and_not_the_run(tmp_path, caplog) -> None:
    (tmp_path / "tokens").write_text("a file where the folder should be")
    scores, correction, _ = packed()
    TokenLog(tmp_path, Logging(), here=True).note(1, scores, correction)
    (said,) = caplog.records
    assert said.levelname == "WARNING" and "the tokens of step 1 were not recorded" in said.getMessage()


@pytest.mark.parametrize("damage", ["truncated", "not a zip", "an array is missing"])
def test_a_broken_record_is_named(tmp_path, damage: str) -> None:
    path = tmp_path / "tokens" / "step-000001.npz"
    save(path, record_of(1, *packed()[:2], 3))
    whole = path.read_bytes()
    assert load(path).step == 1
    if damage == "an array is missing":
        with path.open("wb") as file:
            np.savez(file, step=1)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"<html>")
    with pytest.raises(ValueError, match=r"step-000001.npz is no record of tokens"):
        load(path)


def test_the_page_gets_every_token_once_with_its_kind_and_numbers(tmp_path: Path) -> None:
    record = record_of(1, *packed()[:2], 3)
    view = token_view(written(tmp_path, record), NewestDecisions(), lambda token: f"[{token}]")
    (shown,) = view["records"]
    assert [view["texts"][place] for place in shown["token"]] == [f"[{token}]" for token in record.token_N]
    expected = np.where(record.keep_N, "k", "r")
    expected = np.where(record.trained_N, expected, "u")
    expected = np.where(record.response_N, expected, "p")
    assert shown["kind"] == "".join(expected) and set(shown["kind"]) == set("pkru")
    for name, values in (("policy", record.target_logp_N), ("server", record.server_logp_N)):
        assert shown["logp"][name] == pytest.approx(values.tolist(), rel=1e-3)
    assert shown["weight"] == pytest.approx(record.weight_N.tolist(), rel=1e-2)
    assert [one["right"] for one in shown["rollouts"]] == record.correct_S.tolist()
    assert [one["length"] for one in shown["rollouts"]] == list(LENGTHS)
    assert view["recorded"] == record.trained_N.sum() and view["omitted"] == 0 and view["counted"] == [1, 1]


def test_a_page_holds_whole_rollouts_up_to_its_limit_and_counts_the_others(tmp_path, monkeypatch) -> None:
    record = record_of(1, *packed()[:2], 3)
    monkeypatch.setattr("megatron_jackpot.monitor.report.tokens.MOST_TOKENS", 2 * (LENGTHS[0] + LENGTHS[1]))
    view = token_view(written(tmp_path, record, record), NewestDecisions(), str)
    assert view["omitted"] == 2 and all(len(one["kind"]) == sum(LENGTHS[:2]) for one in view["records"])
    assert view["recorded"] == 2 * record.trained_N.sum()


def test_a_number_that_is_not_finite_is_missing_on_the_page(tmp_path: Path) -> None:
    record = record_of(1, *packed()[:2], 3)
    record.server_logp_N[:] = (np.nan, np.inf, -np.inf) * (len(record.token_N) // 3)
    (shown,) = token_view(written(tmp_path, record), NewestDecisions(), str)["records"]
    assert shown["logp"]["server"] == [None] * len(record.token_N)


def test_the_most_rejected_tokens_are_counted_by_hand() -> None:
    record = record_of(1, *packed()[:2], 3)
    rows = {row.token: row for row in most_rejected([decisions(record)] * 2, most=1000)}
    trained = record.token_N[record.trained_N]
    for token in np.unique(trained):
        here = record.trained_N & (record.token_N == token)
        lost = int((here & ~record.keep_N).sum())
        if not lost:
            assert token not in rows
            continue
        row = rows[int(token)]
        ratios = np.exp((record.target_logp_N - record.server_logp_N)[here])
        assert (row.seen, row.rejected) == (2 * int(here.sum()), 2 * lost)
        assert row.median_ratio == pytest.approx(np.median(ratios), rel=1e-5)
    counts = [row.rejected for row in rows.values()]
    assert counts == sorted(counts, reverse=True)


def test_of_a_long_run_only_what_is_shown_and_the_newest_records_are_read(tmp_path, monkeypatch) -> None:
    """Of 100 records 12 are on the page, and as many are counted as hold so many tokens; at the next look
    those that are new."""
    record = record_of(1, *packed()[:2], 3)
    files = written(tmp_path, *[record] * 100)
    trained = int(record.trained_N.sum())
    monkeypatch.setattr(rejections, "MOST_COUNTED", 5 * trained - 1)
    read: list[Path] = []
    for module in ("tokens", "rejections"):
        name = f"megatron_jackpot.monitor.report.{module}.load"
        monkeypatch.setattr(name, lambda path: read.append(path) or load(path))
    newest = NewestDecisions()
    view = token_view(files, newest, str)
    assert [one["step"] for one in view["records"]][::11] == [1, 100] and len(view["records"]) == 12
    assert (view["counted"], view["recorded"]) == ([5, 100], 5 * trained)
    assert view["rejected"][0][1] == 5 * (record.token_N == most_rejected([decisions(record)])[0].token).sum()
    assert sorted(read[12:]) == files[-5:]
    read.clear()
    monkeypatch.setattr(rejections, "MOST_RECORDS", 3)
    kept_all = replace(record, keep_N=record.trained_N)
    save(files[-1], kept_all)
    assert token_view(files, newest, str)["counted"] == [3, 100] and read[12:] == files[-1:]


def test_long_runs_show_the_first_the_last_and_some_between() -> None:
    assert chosen(list(range(5)), 12) == [0, 1, 2, 3, 4]
    some = chosen(list(range(100)), 12)
    assert len(some) == 12 and some[0] == 0 and some[-1] == 99 and some == sorted(set(some))
