"""The report in a real browser: drawn, zoomed, smoothed, filtered, live. Skipped where no Chromium is."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_jackpot.monitor.metrics import JsonLines
from megatron_jackpot.monitor.report import rejections
from megatron_jackpot.monitor.report.page import write_report
from megatron_jackpot.monitor.report.serve import ReportServer
from tests.data.browser import Browser, find
from tests.data.runs import EVIL, LONG, make_run

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium: apt-get install chromium-headless-shell")

RANGES = "plots.map((plot) => [plot.scales.x.min, plot.scales.x.max])"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report([make_run(tmp_path_factory.mktemp("runs") / "a run")]).as_uri()


@pytest.fixture(autouse=True)
def nothing_is_complained_of(browser: Browser) -> Iterator[None]:
    browser.errors.clear()
    yield
    assert browser.errors == [] and browser.run("document.title") != "broken"


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)")


def choose(browser: Browser, name: str, value: str) -> None:
    change = "dispatchEvent(new Event('change'))"
    browser.run(
        f"(() => {{ const e = document.getElementById('{name}'); e.value = '{value}'; e.{change} }})()"
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_every_chart_is_drawn_and_nothing_sticks_out(browser: Browser, page: str, width: int) -> None:
    browser.size(width)
    browser.open(page)
    titles = texts(browser, ".chart h3")
    assert titles[0] == "Held-out accuracy" and any("Effective sample size" in title for title in titles)
    assert (
        browser.run("plots.length")
        == len(titles)
        == browser.run("document.querySelectorAll('canvas').length")
    )
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    pixels = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 300, 200).data.buffer"
    assert browser.run(f"new Set(new Uint32Array({pixels})).size") > 10


def test_text_of_a_model_stays_text(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.run("document.querySelectorAll('img, iframe, main script').length") == 0
    assert EVIL in texts(browser, ".facts td")
    choose(browser, "answers-which", "all")
    assert any(text.startswith(EVIL + LONG[:100]) for text in texts(browser, ".given pre"))
    assert any("train.log" in text and EVIL in text for text in texts(browser, "#notes li"))
    assert any(EVIL in text for text in texts(browser, "#tasks td"))


def test_what_an_allocator_did_is_shown_by_prompt_of_the_step_that_is_chosen(
    browser: Browser, page: str
) -> None:
    browser.open(page)
    assert texts(browser, "#allocated-step option")[0] == "1"
    choose(browser, "allocated-step", "1")
    cells = texts(browser, "#allocated-prompts td")
    assert cells[8:16] == ["7", "0", "8", "12", "3", "1", "differ", "yes"]
    assert cells[16:] == ["31", "2", "8", "0", "0", "0", "lost", "no"]


def test_dragging_zooms_all_curves_and_the_button_shows_all_again(browser: Browser, page: str) -> None:
    browser.size(1280)
    browser.open(page)
    whole = browser.run(RANGES)
    assert whole[0] == [0, 30] and browser.run("document.getElementById('whole').disabled")
    browser.drag(".u-over", 0.25, 0.5)
    zoomed = browser.run(RANGES)
    assert len({tuple(one) for one in zoomed}) == 1
    assert zoomed[0] == pytest.approx([7.5, 15], abs=0.5)
    browser.click("#whole")
    assert browser.run(RANGES) == whole


def test_smoothing_is_the_unbiased_exponential_mean_and_keeps_the_raw_line(
    browser: Browser, page: str
) -> None:
    browser.open(page)
    loss = "plots.find((plot) => plot.series.some((one) => one.label === 'loss/policy'))"
    raw = browser.run(f"{loss}.data[1]")
    browser.run("document.getElementById('smooth').value = 0.5")
    browser.run("document.getElementById('smooth').dispatchEvent(new Event('input'))")
    assert browser.run(f"{loss}.data[1]") == raw
    mean = share = 0.0
    for value, smooth in zip(raw, browser.run(f"{loss}.data[2]"), strict=True):
        if value is None:
            assert smooth is None
            continue
        mean, share = 0.5 * mean + 0.5 * value, 0.5 * share + 0.5
        assert smooth == pytest.approx(mean / share)


def test_a_click_on_a_name_hides_its_line(browser: Browser, page: str) -> None:
    browser.open(page)
    shown = "plots[0].series.map((one) => one.show)"
    assert browser.run(shown) == [True, True, True]
    browser.click(".u-legend .u-series:nth-child(2) th")
    assert browser.run(shown) == [True, False, True]


def test_tokens_are_filtered_and_put_in_order(browser: Browser, page: str) -> None:
    browser.open(page)

    def rollouts() -> list[str]:
        return texts(browser, "#rollouts .rollout small")

    assert len(rollouts()) == 2
    assert [len(texts(browser, f"#rollouts .{kind}")) for kind in "pkru"] == [4, 5, 3, 0]
    choose(browser, "order", "rejected")
    assert "3 of 4 rejected" in rollouts()[0]
    choose(browser, "order", "heaviest")
    assert "0 of 4 rejected" in rollouts()[0]
    choose(browser, "verdict", "wrong")
    assert len(rollouts()) == 1 and "wrong" in rollouts()[0]
    choose(browser, "step", "all")
    assert len(rollouts()) == 2
    choose(browser, "verdict", "all")
    choose(browser, "mark", "heavy")
    assert len(rollouts()) == 2 and all("right" in one for one in rollouts())
    browser.click("#reset")
    assert len(rollouts()) == 2
    browser.click("#rejected tbody tr")
    wanted = browser.run("document.getElementById('text').value")
    assert len(rollouts()) == 2
    assert set(texts(browser, "#rollouts .r:not(.dim)")) == {wanted}
    browser.click("#rollouts .r")
    detail = browser.run("document.getElementById('detail').textContent")
    assert "policy 0.368, server 0.607, actor 0.607, ratio 0.607, weight" in detail


def test_a_table_of_fewer_tokens_than_were_recorded_says_of_which(
    browser: Browser, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.open(page)
    assert texts(browser, "#tokens p")[0].startswith("Of the 16 recorded tokens, those")
    monkeypatch.setattr(rejections, "MOST_RECORDS", 1)
    browser.open(write_report([make_run(tmp_path / "run")]).as_uri())
    assert texts(browser, "#tokens p")[0].startswith("Of the 8 recorded tokens of the last 1 of 2 records,")


def test_wrong_answers_stand_beside_the_right_one(browser: Browser, page: str) -> None:
    browser.open(page)
    assert "All of them right." in texts(browser, "#answers p")
    (rolled,) = texts(browser, "#answers .answer")
    assert "right answer7" in rolled and "a rollout cut at the limit6" in rolled and "the seven" in rolled
    choose(browser, "answers-step", "0")
    (card,) = texts(browser, "#answers .answer")
    assert "policy" in card and "actor" in card and "right answer5" in card


def test_seeds_are_bands_and_what_differs_is_the_legend(browser: Browser, tmp_path: Path) -> None:
    made = [("a", 0, "jackpot", 0.0), ("b", 1, "jackpot", 0.2), ("c", 0, "tis", 0.4)]
    runs = [make_run(tmp_path / n, seed=s, correction=c, offset=o) for n, s, c, o in made]
    browser.size(1280)
    browser.open(write_report(runs, tmp_path / "all.html").as_uri())
    labels = browser.run("plots[0].series.slice(1).map((one) => one.label)")
    assert labels[0] == "correction=jackpot eval/policy_accuracy (2 seeds)"
    mean, high, low = browser.run("plots[0].data.slice(1, 4).map((one) => one[0])")
    assert (mean, high, low) == pytest.approx((0.4, 0.5, 0.3))
    assert browser.run("plots[0].bands.map((one) => one.series)")[0] == [2, 3]
    browser.click("#bands")
    assert browser.run("plots[0].bands.length") == 0
    assert any("seed=1" in label for label in browser.run("plots[0].series.slice(1).map((one) => one.label)"))
    assert texts(browser, "#key div") == []


def test_runs_of_long_names_are_numbers_in_every_legend_and_named_once(
    browser: Browser, tmp_path: Path
) -> None:
    made = [("a", 0, "long" * 9), ("b", 1, "long" * 9), ("c", 0, "tis")]
    runs = [make_run(tmp_path / n, seed=s, correction=c) for n, s, c in made]
    browser.size(400)
    browser.open(write_report(runs, tmp_path / "all.html").as_uri())
    legend = "plots[0].series.filter((one) => one.class !== 'extra').slice(1).map((one) => one.label)"
    assert texts(browser, "#key div") == [f"1 correction={'long' * 9}", "2 correction=tis"]
    assert browser.run(legend)[0] == "1 eval/policy_accuracy (2 seeds)"
    browser.click("#bands")
    assert [text.split()[0] for text in texts(browser, "#key div")] == ["1.1", "1.2", "2"]
    assert browser.run(legend)[::2] == [f"{mark} eval/policy_accuracy" for mark in ("1.1", "1.2", "2")]
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_policy_has_one_colour_and_a_line_below_another_is_seen(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    more = JsonLines(run / "metrics.jsonl")
    for step, value in ((0, 0.1), (30, 0.3)):
        more.write({"step": step, **{f"eval/hard/{name}_accuracy": value for name in ("actor", "policy")}})
    more.close()
    browser.open(write_report([run]).as_uri())
    hard = "plots.find((plot) => plot.series.some((one) => one.label === 'eval/hard/policy_accuracy'))"
    assert browser.run(f"{hard}.series.slice(1).map((one) => one.label)")[0] == "eval/hard/policy_accuracy"
    stroke = "series.slice(1).map((one) => one._stroke || one.stroke())"
    assert browser.run(f"{hard}.{stroke}") == browser.run(f"plots[0].{stroke}")
    assert browser.run(f"{hard}.series.slice(1).map((one) => one.dash.length)") == [0, 2]


def test_the_served_page_draws_what_the_run_writes_and_keeps_what_was_chosen(
    browser: Browser, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=20)
    with ReportServer([run], 0) as report:
        serving = threading.Thread(target=report.serve_forever, daemon=True)
        serving.start()
        browser.open(report.url)
        browser.wait("document.getElementById('live').textContent === 'live'")
        browser.drag(".u-over", 0.25, 0.75)
        zoomed = browser.run(RANGES)
        more = JsonLines(run / "metrics.jsonl")
        more.write({"step": 21, "reward/mean": 0.75, "time/step": 2.0})
        more.close()
        browser.wait("document.querySelector('.verdict').textContent.includes('21 of 31')")
        assert browser.run(RANGES) == zoomed
        reward = "plots.find((plot) => plot.series.some((one) => one.label === 'reward/mean'))"
        assert browser.run(f"{reward}.data[0].at(-1)") == 21
        report._server.shutdown()
        serving.join(timeout=10)
