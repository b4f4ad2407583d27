"""The Prometheus endpoint serves what was written, and the dashboard asks for names that exist."""

import json
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_jackpot.monitor.metrics import METRICS
from megatron_jackpot.monitor.prometheus import PREFIX, PrometheusEndpoint, gauge_name

ROOT = Path(__file__).parents[2]


def scrape(endpoint: PrometheusEndpoint, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}{path}", timeout=5) as answer:
        return answer.read().decode()


def test_the_endpoint_listens_on_ipv6_too() -> None:
    if not (Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text()):
        pytest.skip("no IPv6 here")
    with PrometheusEndpoint("::1", 0) as endpoint:
        with urllib.request.urlopen(f"http://[::1]:{endpoint.port}/metrics", timeout=5) as answer:
            assert answer.status == 200


def test_a_scrape_gives_the_last_values_in_prometheus_own_format() -> None:
    with PrometheusEndpoint("127.0.0.1", 0) as endpoint:
        endpoint.write(3, {"reward/mean": 0.25, "eval/policy_accuracy": 0.5})
        endpoint.write(4, {"reward/mean": 0.75, "jackpot/z": float("nan")})
        families = {f.name: f for f in text_string_to_metric_families(scrape(endpoint))}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape(endpoint, "/other")
    values = {name: family.samples[0].value for name, family in families.items()}
    del values[PREFIX + "updated_seconds"]
    assert values == {
        PREFIX + "step": 4.0,
        PREFIX + "reward_mean": 0.75,
        PREFIX + "eval_policy_accuracy": 0.5,
    }
    assert families[PREFIX + "reward_mean"].documentation == METRICS["reward/mean"]


def test_a_port_in_use_is_refused_with_the_field() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"logging.prometheus_port = {port} on 127.0.0.1 cannot be used"):
            PrometheusEndpoint("127.0.0.1", port)


def test_names_are_distinct_and_the_dashboard_asks_for_them_only() -> None:
    names = {gauge_name(metric) for metric in METRICS} | {PREFIX + "step", PREFIX + "updated_seconds"}
    assert len(names) == len(METRICS) + 2
    dashboard = json.loads((ROOT / "docs/dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    ours = {name for expr in asked for name in re.findall(PREFIX + r"\w+", expr)}
    assert ours <= names and len(ours) > 10
    assert any("sglang:" in expr for expr in asked)
