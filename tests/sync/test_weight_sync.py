"""The parts of a weight sync that need no real server: buckets, folders, names, proof, time limits."""

import asyncio
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("aiohttp")

from megatron_jackpot.models.hf_folder import buckets, write_hf_folder
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import Label, ServerError
from megatron_jackpot.sync.broadcast import BroadcastSync, address_towards, side_by_side
from megatron_jackpot.sync.ipc import IPCSync
from megatron_jackpot.sync.proof import Proof, SentTensors, SyncError, check_names, hf_shapes, paused
from megatron_jackpot.sync.retry import ATTEMPTS
from tests.servers.fake_server import FakeServer, ok
from tests.tiny import write_model


def checksums(value: str, rank: int = 0) -> dict:
    place = {"role": "target", "tp_rank": rank, "pp_rank": 0}
    return {"success": True, "ranks": [{"checksums": {"w": value, "v": "same"}, "parallelism_info": [place]}]}


def info(version: str) -> dict:
    return {"weight_version": version}


def sent(folder: Path, scale: float = 1.0) -> SentTensors:
    tensors = SentTensors()
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors.add(name, tensor * scale)
    return tensors


def test_buckets_hold_one_dtype_and_stay_under_the_size_where_a_tensor_fits():
    named = [(f"t{i}", torch.zeros(size)) for i, size in enumerate([10, 10, 100, 5])]
    named += [("h", torch.zeros(3, dtype=torch.bfloat16))]
    names = [[name for name, _ in bucket] for bucket in buckets(named, 80)]
    assert names == [["t0", "t1"], ["t2"], ["t3"], ["h"]]


def test_a_written_folder_holds_the_same_tensors_in_shards_and_the_other_files(tmp_path):
    source = write_model(tmp_path / "source", 0)
    (source / "tokenizer.json").write_text("{}")
    tensors = load_file(source / "model.safetensors")
    write_hf_folder(tmp_path / "out", tensors.items(), source, bucket_bytes=10_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert len(shards) > 3 and written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert hf_shapes(tmp_path / "out") == hf_shapes(source)
    names = {path.name for path in tmp_path.joinpath("out").iterdir()} - {shard.name for shard in shards}
    assert names == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_names_and_shapes_must_be_those_of_the_hf_folder():
    expected = {"a": [2, 3], "lm_head.weight": [5, 2]}
    check_names({"a": [2, 3]}, expected, {"lm_head.weight"})
    with pytest.raises(SyncError, match="lm_head.weight was not sent but in"):
        check_names({"a": [2, 3]}, expected)
    with pytest.raises(SyncError, match="b was sent but not in"):
        check_names({**expected, "b": [1]}, expected)
    with pytest.raises(SyncError, match=r"a was sent as \[3, 2\]"):
        check_names({**expected, "a": [3, 2]}, expected)


def test_proof_wants_equal_servers_moved_checksums_and_the_version(tmp_path):
    folder = write_model(tmp_path / "m", 0)
    one = {"model_info": [ok(info("1")), ok(info("2"))]}
    with FakeServer(**one, weights_checker=[ok(checksums("x"))]) as left:
        proof = Proof(ServerAdmin([left.url]), folder)
        proof.check(sent(folder), Label(1))
        proof.check(sent(folder), Label(2))
        with pytest.raises(SyncError, match="checksums did not move"):
            proof.check(sent(folder, scale=1.5), Label(2))
        with pytest.raises(SyncError, match=f"{left.url} reports weight version 2 after a push of version 3"):
            proof.check(sent(folder), Label(3))
        with FakeServer(model_info=[ok(info("2"))], weights_checker=[ok(checksums("y"))]) as right:
            both = Proof(ServerAdmin([left.url, right.url]), folder)
            with pytest.raises(SyncError, match=f"{left.url} and {right.url} in 1 tensors: tp0 pp0 w"):
                both.check(sent(folder), Label(2))


class Holder(FakeServer):
    """A server that holds what it was sent last, unless it is `deaf`: it then keeps what it has and says
    nothing."""

    def __init__(self) -> None:
        self.held, self.version, self.deaf = "a folder's", "default", False
        tell = {
            "server_info": lambda _: {"tp_size": 1},
            "model_info": lambda _: info(self.version),
            "weights_checker": lambda _: checksums(self.held),
            "update_weights_from_tensor": self._take,
            "update_weight_version": self._stamp,
        }
        scripts = {
            path: [lambda handler, body, say=say: ok(say(body))(handler, body)] for path, say in tell.items()
        }
        super().__init__(**scripts)

    def _take(self, body: dict) -> dict:
        if not self.deaf:
            self.held = body["serialized_named_tensors"][0]
        return {"success": True}

    def _stamp(self, body: dict) -> dict:
        self.version = body["new_version"]
        return {"success": True}

    def asked_for_checksums(self, call) -> int:
        before = len(self.asked("weights_checker"))
        call()
        return len(self.asked("weights_checker")) - before


def pusher(servers: list[Holder], folder: Path, **knobs):
    """A push of version n, of weights that each version has of its own."""
    sync = IPCSync(
        [server.url for server in servers], hf_folder=folder, proof_folder=None, timeout_s=10, **knobs
    )
    tensors = load_file(folder / "model.safetensors")
    return lambda n, **how: sync.push([(name, tensor * n) for name, tensor in tensors.items()], n, **how)


@pytest.mark.parametrize("since", [2, 3, 4, 5, 6])
def test_a_server_that_keeps_old_weights_is_found_within_so_many_pushes_as_lie_between_checksums(
    tmp_path, since
):
    folder, every = write_model(tmp_path / "m", 0), 3
    with Holder() as server:
        push = pusher([server], folder, checksums_every=every)
        for version in range(1, since):
            assert (push(version).checksum is not None) == (version == 1 or version % every == 2)
        server.deaf = True
        with pytest.raises(SyncError, match="checksums did not move"):
            for version in range(since, since + every):
                push(version)
        # Each push reads the version before it and after, also without checksums; the last was tried 3 times,
        # and told the server no version.
        assert version % every == 2 and len(server.asked("model_info")) == 2 * (version - 1) + ATTEMPTS
        assert server.version == str(version - 1)
        server.version, server.deaf = "7", False
        server.scripts["/update_weight_version"] = [ok({})]
        with pytest.raises(SyncError, match="reports weight version 7 after a push of version 9"):
            push(9)


def test_checksums_are_asked_for_twice_after_a_start_a_restart_and_a_push_that_broke_off(tmp_path):
    folder = write_model(tmp_path / "m", 0)
    with Holder() as server, Holder() as other:
        push = pusher([server, other], folder, checksums_every=100)
        counts = [server.asked_for_checksums(lambda n=n: push(n)) for n in (1, 2, 3)]
        server.version = "default"  # Another process under the same address.
        counts += [server.asked_for_checksums(lambda n=n: push(n)) for n in (4, 5, 6)]
        server.scripts["/update_weights_from_tensor"].insert(0, ok({"success": False}))
        counts += [server.asked_for_checksums(lambda n=n: push(n)) for n in (7, 8, 9)]
        assert counts == [1, 1, 0] * 3
        server.version, server.deaf = "default", True
        with pytest.raises(SyncError, match=f"{server.url} and {other.url} in 1 tensors"):
            push(10)
        # Left out of a later attempt, none may say that it has what it was not shown to have.
        assert server.version == "default" and other.version == "9"
    with Holder() as alone:
        push = pusher([alone], folder, checksums_every=100)
        for version in (1, 2, 3):
            push(version)
        alone.version, alone.deaf = "default", True
        push(4)  # What it had before is not known: it may have moved.
        with pytest.raises(SyncError, match="checksums did not move"):
            push(5)


class Group:
    """In the place of a WeightGroup, which meets the servers' ranks."""

    made: ClassVar[list["Group"]] = []

    def __init__(self, admin: ServerAdmin, **knobs: object) -> None:
        self.name = f"group-{len(self.made)}"
        self.made.append(self)


def test_a_server_that_was_started_again_at_its_address_is_met_in_a_new_group(tmp_path, monkeypatch):
    """It is in no group, and the others would wait for a broadcast that cannot come."""
    folder = write_model(tmp_path / "m", 0)
    monkeypatch.setattr("megatron_jackpot.sync.broadcast.WeightGroup", Group)
    monkeypatch.setattr(Group, "made", [])
    monkeypatch.setattr(BroadcastSync, "_send", IPCSync._send)
    monkeypatch.setattr(BroadcastSync, "tp_sizes", [1, 1], raising=False)
    tensors = [*load_file(folder / "model.safetensors").items()]
    with Holder() as server, Holder() as other:
        sync = BroadcastSync(
            [server.url, other.url], hf_folder=folder, proof_folder=None, backend="gloo", timeout_s=10
        )
        for version in (1, 2):
            sync.push([(name, tensor * version) for name, tensor in tensors], version)
        assert len(Group.made) == 1
        other.version = "default"
        sync.push([(name, tensor * 3) for name, tensor in tensors], 3)
        assert len(Group.made) == 2
        assert server.asked("destroy_weights_update_group") == [{"group_name": "group-0"}]


def test_a_group_is_dissolved_on_every_server_whoever_is_gone():
    with FakeServer(destroy_weights_update_group=[ok({}, after_s=0.2)]) as alive:
        gone = FakeServer()
        with gone:
            url = gone.url
        with pytest.raises(ServerError, match=url):
            asyncio.run(ServerAdmin([url, alive.url]).destroy_group("weights"))
        assert len(alive.asked("destroy_weights_update_group")) == 1


def test_a_push_that_is_to_mend_something_asks_for_checksums_and_so_does_the_next(tmp_path):
    with Holder() as server:
        push = pusher([server], write_model(tmp_path / "m", 0), checksums_every=100)
        for version in (1, 2, 3):
            push(version)
        how = [{"mend": True}, {}, {}]
        counts = [server.asked_for_checksums(lambda n=n: push(n, **how[n - 4])) for n in (4, 5, 6)]
    assert counts == [1, 1, 0]


def test_a_push_that_was_lost_without_a_word_is_healed_by_the_same_weights_sent_again(tmp_path, caplog):
    with Holder() as server:
        push = pusher([server], write_model(tmp_path / "m", 0), checksums_every=2)
        for version in (1, 2):
            assert push(version).checksum
        server.deaf = True
        assert push(3).checksum is None
        server.deaf, lost = False, server.held
        assert push(3).checksum and server.held != lost
    assert "The push before this one had not reached the servers" in caplog.text


def test_servers_that_came_apart_between_checksums_are_told_and_healed_by_the_push_that_finds_it(
    tmp_path, caplog
):
    with Holder() as server, Holder() as other:
        push = pusher([server, other], write_model(tmp_path / "m", 0), checksums_every=2)
        for version in (1, 2, 3):
            push(version)
        other.held = "damaged"
        assert push(4).checksum and other.held == server.held
    assert f"Weights differ between {server.url} and {other.url}" in caplog.text


def test_a_bucket_that_was_written_over_while_it_was_sent_is_found_without_checksums(tmp_path, monkeypatch):
    with Holder() as server:
        push = pusher([server], write_model(tmp_path / "m", 0), checksums_every=100)
        push(1)
        send = IPCSync._send

        def late(self, bucket, **more) -> None:
            bucket.flat[3] += 1
            send(self, bucket, **more)

        monkeypatch.setattr(IPCSync, "_send", late)
        with pytest.raises(SyncError, match="1 tensors were sent with other values than were exported"):
            push(2)


def test_an_error_while_paused_aborts_and_resumes_the_servers():
    with FakeServer() as server:
        with pytest.raises(ZeroDivisionError):
            with paused(ServerAdmin([server.url])):
                raise ZeroDivisionError
        paths = [path for path, _ in server.requests]
    assert paths == ["/pause_generation", "/abort_request", "/continue_generation"]


def test_a_refused_call_ends_the_wait_while_the_broadcast_still_hangs():
    hold, ended = threading.Event(), threading.Event()

    def broadcast() -> None:
        hold.wait(60)
        ended.set()

    async def refuse() -> None:
        await asyncio.sleep(0.1)
        raise ServerError("refused")

    with pytest.raises(ServerError, match="refused"):
        side_by_side(broadcast, refuse(), 50, "a test")
    assert not ended.is_set()
    hold.set()


@pytest.mark.parametrize(
    ("work_s", "reply_s", "late"), [(5, 0, "the broadcast"), (0, 5, "the servers' reply")]
)
def test_whichever_side_is_missing_at_the_time_limit_is_named(work_s, reply_s, late):
    with pytest.raises(SyncError, match=f"Waited 0.3 s for a test; {late} is missing"):
        side_by_side(lambda: time.sleep(work_s), asyncio.sleep(reply_s), 0.3, "a test")


def test_an_error_of_the_broadcast_is_told_while_the_reply_is_still_missing():
    with pytest.raises(SyncError, match="Failed while waiting for a test: division by zero"):
        side_by_side(lambda: 1 / 0, asyncio.sleep(5), 4, "a test")


def test_the_address_of_this_machine_towards_a_local_server_is_loopback():
    assert address_towards("http://127.0.0.1:1234") == "127.0.0.1"
