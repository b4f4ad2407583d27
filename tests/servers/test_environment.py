"""What children get whatever this machine's environment says: no proxy, caches, UTF-8, IPv6 addresses."""

import asyncio
import resource
import socket
import sys
from pathlib import Path

import pytest

from megatron_jackpot.config import ConfigError
from megatron_jackpot.servers.address import free_port, port_is_free, url_of
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.environment import CACHES, child_environment, without_proxy, writable_caches
from megatron_jackpot.servers.process import ServerProcess
from megatron_jackpot.sync import retry
from megatron_jackpot.sync.broadcast import address_towards
from megatron_jackpot.sync.retry import PushInterrupted, wait_for_healthy
from tests.servers.fake_server import FakeServer, ok

HEALTHY = """
import http.server, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers()
        self.wfile.write(b"{}")
    do_POST = do_GET
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""
HAS_IPV6 = socket.has_ipv6 and Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text()
HOSTS = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here"))]


@pytest.mark.parametrize("host", HOSTS)
def test_a_proxy_in_the_environment_is_not_asked_for_servers_of_ours(tmp_path, monkeypatch, host):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    port = free_port(host)
    server = ServerProcess(
        [sys.executable, "-c", HEALTHY, host, str(port)], host=host, port=port, log_path=tmp_path / "log"
    )
    server.start()
    try:
        server.wait_healthy(60)
        asyncio.run(ServerAdmin([server.url]).alive())
        assert list(wait_for_healthy([server.url], 0)) == [server.url]
        assert address_towards(server.url) == host
        assert not port_is_free(host, port)
    finally:
        server.stop(1)


def test_children_ask_servers_of_the_run_and_this_machine_without_a_proxy():
    both = without_proxy({"no_proxy": "a.example", "NO_PROXY": "b.example, ::1"}, ["http://[fd00::7]:3/x"])
    assert both["no_proxy"] == both["NO_PROXY"]
    names = both["no_proxy"].split(",")
    assert {"a.example", "b.example", "localhost", "127.0.0.1", "::1", "fd00::7"} <= set(names)
    assert len(names) == len(set(names))
    assert without_proxy({"NO_PROXY": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}


@pytest.mark.parametrize("home", ["/proc/nohome", "/dev/null"])
def test_without_a_home_caches_lie_in_the_runs_folder_and_what_is_set_stays(tmp_path, home):
    given = {"HOME": home, "TRITON_CACHE_DIR": "/mine"}
    caches = writable_caches(given, tmp_path)
    assert set(caches) == CACHES.keys() - {"TRITON_CACHE_DIR"}
    for path in map(Path, caches.values()):
        assert path.is_dir() and tmp_path / "cache" in path.parents
    assert child_environment(given, tmp_path)["TRITON_CACHE_DIR"] == "/mine"


def test_a_home_whose_quota_is_used_up_takes_no_caches(tmp_path):
    (tmp_path / "home").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        caches = writable_caches({"HOME": str(tmp_path / "home")}, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caches.keys() == CACHES.keys()


def test_a_user_id_without_a_name_gets_one_and_caches_in_the_runs_folder(tmp_path, monkeypatch):
    def nobody(uid):
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    given = child_environment({"LANG": "C"}, tmp_path)
    assert given["USER"].isdigit() and given.keys() >= CACHES.keys()
    assert "USER" not in child_environment({"LOGNAME": "me"}, tmp_path)


def test_with_a_home_nothing_is_moved(tmp_path):
    (tmp_path / "home").mkdir()
    assert writable_caches({"HOME": str(tmp_path / "home")}, tmp_path / "run") == {}
    assert not (tmp_path / "run").exists()


def test_addresses_of_both_kinds():
    assert url_of("10.0.0.1", 7) == "http://10.0.0.1:7"
    assert url_of("::1", 7) == url_of("::", 7) == "http://[::1]:7"
    assert url_of("0.0.0.0", 7) == "http://127.0.0.1:7"


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid", "[::1]", "2001:db8::7"])
def test_an_address_that_is_not_here_is_refused_with_the_remedy(host):
    with pytest.raises(ConfigError, match="servers.host = .*Set it to one of this machine's"):
        free_port(host)


def test_a_busy_scheduler_is_waited_for_and_a_server_that_hangs_is_not(monkeypatch):
    monkeypatch.setattr(retry, "ALIVE_LIMIT_S", 0.5)
    slow, never = ok({}, after_s=1.0), ok({}, after_s=3.0)
    with FakeServer(update_weight_version=[slow]) as busy, FakeServer(model_info=[never]) as hung:
        assert wait_for_healthy([busy.url, hung.url], 0) == {busy.url: "0"}
        # What the scheduler is told is what the server says already.
        assert busy.asked("update_weight_version") == [{"new_version": "0", "abort_all_requests": False}]
        assert not hung.asked("update_weight_version")


def test_waiting_for_servers_ends_at_once_when_the_run_is_to_stop():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(PushInterrupted, match="SIGTERM"):
        wait_for_healthy([url], 300, lambda: "SIGTERM")
