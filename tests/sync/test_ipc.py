"""Requests of an IPC sync, and the order in which servers lend and take back their memory, against a scripted
server."""

import ast
import base64
import importlib.util
import io
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("aiohttp")

from megatron_jackpot.servers.protocol import ServerError
from megatron_jackpot.sync import ipc
from megatron_jackpot.sync.ipc import IPCSync, serialise
from megatron_jackpot.sync.prefetcher import FlatBucket
from megatron_jackpot.sync.retry import ATTEMPTS
from tests.servers.fake_server import FakeServer, error, ok, versions
from tests.sync.test_weight_sync import checksums
from tests.tiny import write_model

CPU = torch.device("cpu")


def test_a_bucket_is_sglangs_flattened_bucket_of_allowed_classes():
    named = [("a", torch.randn(2, 3)), ("b", torch.randn(4))]
    content = pickle.loads(base64.b64decode(serialise(FlatBucket.of(named, CPU))))
    assert content.keys() == {"flattened_tensor", "metadata"}
    for (name, tensor), place in zip(named, content["metadata"], strict=True):
        piece = content["flattened_tensor"][place.start_idx : place.end_idx]
        assert place.name == name and place.numel == piece.numel() == tensor.nbytes
        assert torch.equal(piece.view(place.dtype).reshape(place.shape), tensor)


def allowed_globals() -> set[tuple[str, str]]:
    """What the installed SGLang unpickles, read from its source: importing it takes long."""
    spec = importlib.util.find_spec("sglang")
    if spec is None:
        pytest.skip("sglang is not installed")
    source = Path(spec.submodule_search_locations[0], "srt/utils/common.py").read_text()
    (unpickler,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "SafeUnpickler"
    )
    (listed,) = (node.value for node in unpickler.body if isinstance(node, ast.Assign))
    (find,) = (node for node in unpickler.body if isinstance(node, ast.FunctionDef))
    mended = [ast.literal_eval(n) for n in ast.walk(find) if isinstance(n, ast.Tuple) and _literal(n)]
    return ast.literal_eval(listed) | set(mended)


def _literal(node: ast.Tuple) -> bool:
    return all(isinstance(part, ast.Constant) for part in node.elts)


def named_globals(pickled: bytes) -> set[tuple[str, str]]:
    """(module, name) of every global that unpickling looks up."""
    seen = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            seen.add((module, name))
            return super().find_class(module, name)

    Reader(io.BytesIO(pickled)).load()
    return seen


def test_what_a_bucket_names_is_on_sglangs_list_whatever_was_put_in_place_of_torchs_functions(monkeypatch):
    """megatron-core 0.19.2 puts its own loader of storages into torch: SGLang blocks it and ends."""
    named = [("a", torch.randn(2, 3)), ("b", torch.randn(4).bfloat16())]
    loader = torch.storage._load_from_bytes

    def safe_load_from_bytes(content):
        return loader(content)

    safe_load_from_bytes.__module__, safe_load_from_bytes.__qualname__ = __name__, "safe_load_from_bytes"
    monkeypatch.setitem(globals(), "safe_load_from_bytes", safe_load_from_bytes)
    monkeypatch.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
    pickled = base64.b64decode(serialise(FlatBucket.of(named, CPU)))
    monkeypatch.undo()
    found = named_globals(pickled)
    assert ("torch.storage", "_load_from_bytes") in found
    assert found <= allowed_globals()
    assert ("torch.multiprocessing.reductions", "rebuild_cuda_tensor") in allowed_globals()


def test_a_tensor_on_a_gpu_travels_as_torchs_handle_with_the_devices_uuid():
    """No GPU is needed to see what is pickled: torch's own reduction is stood in for."""
    arguments = (
        "cls",
        "size",
        "stride",
        0,
        "storage",
        "dtype",
        3,
        b"handle",
        8,
        0,
        b"ref",
        0,
        b"event",
        True,
    )
    reduced = (torch.multiprocessing.reductions.rebuild_cuda_tensor, arguments)
    with (
        mock.patch.object(ipc.reductions, "reduce_tensor", lambda tensor: reduced),
        mock.patch("torch.cuda.get_device_properties", lambda device: mock.Mock(uuid=f"GPU-{device}")),
    ):
        rebuild, sent = ipc._handle(torch.zeros(1))
    assert (
        rebuild.__module__ == "torch.multiprocessing.reductions" and rebuild.__name__ == "rebuild_cuda_tensor"
    )
    assert sent == (*arguments[:6], "GPU-3", *arguments[7:])


def scripted(**more):
    return dict(
        server_info=[ok({"tp_size": 2})],
        weights_checker=[ok(checksums("x")), ok(checksums("y"))],
        **versions(),
        **more,
    )


def test_every_rank_of_a_server_gets_a_bucket_and_memory_comes_back_in_the_right_order(tmp_path):
    folder = write_model(tmp_path / "m", 0)
    tensors = load_file(folder / "model.safetensors")
    with FakeServer(**scripted()) as server:
        knobs = dict(hf_folder=folder, proof_folder=None, bucket_bytes=50_000, timeout_s=10)
        sync = IPCSync([server.url], release_memory=True, **knobs)
        sync.push(tensors.items(), 1)
        assert not server.asked("resume_memory_occupation")
        sync.release()
        before = len(server.requests)
        sync.push({name: tensor * 2 for name, tensor in tensors.items()}.items(), 2)
        paths = [path.removeprefix("/") for path, _ in server.requests[before:]]
        bodies = server.asked("update_weights_from_tensor")
        released, resumed = (server.asked(f"{way}_memory_occupation") for way in ("release", "resume"))
    assert len(bodies) > 4 and all(len(body["serialized_named_tensors"]) == 2 for body in bodies)
    assert all(body["load_format"] == "flattened_bucket" for body in bodies)
    flushed = [body["flush_cache"] for body in bodies]
    assert flushed == 2 * [True, *[False] * (len(bodies) // 2 - 1)]  # Once a push, with its first bucket.
    assert set(released[0]["tags"]) == {"weights", "kv_cache", "cuda_graph"}
    assert [body["tags"] for body in resumed] == [["weights", "cuda_graph"], ["kv_cache"]]
    order = [
        path for path in dict.fromkeys(paths) if path not in ("health", "server_info", "weights_checker")
    ]
    assert order.index("pause_generation") < order.index("resume_memory_occupation")
    first, last = (
        paths.index("resume_memory_occupation"),
        len(paths) - 1 - paths[::-1].index("resume_memory_occupation"),
    )
    updates = [i for i, path in enumerate(paths) if path == "update_weights_from_tensor"]
    assert first < updates[0] and updates[-1] < paths.index("end_weight_update", updates[0]) < last
    assert last < paths.index("continue_generation")


def test_no_two_ranks_of_any_server_get_the_same_handle(tmp_path, monkeypatch):
    """A handle counts who has opened it."""
    folder, made = write_model(tmp_path / "m", 0), iter(range(1000))
    monkeypatch.setattr("megatron_jackpot.sync.ipc.serialise", lambda bucket: f"handle-{next(made)}")
    with FakeServer(**scripted()) as server, FakeServer(**scripted()) as other:
        sync = IPCSync([server.url, other.url], hf_folder=folder, proof_folder=None, timeout_s=10)
        sync.push(load_file(folder / "model.safetensors").items(), 1)
        bodies = [body for one in (server, other) for body in one.asked("update_weights_from_tensor")]
    handles = [handle for body in bodies for handle in body["serialized_named_tensors"]]
    assert len(handles) == len(set(handles)) >= 4


def test_a_server_that_was_started_anew_is_asked_for_its_memory_once(tmp_path):
    folder = write_model(tmp_path / "m", 0)
    tensors = load_file(folder / "model.safetensors")
    with FakeServer(**scripted(resume_memory_occupation=[error(500), ok({})])) as server:
        knobs = dict(hf_folder=folder, proof_folder=None, timeout_s=10)
        sync = IPCSync([server.url], release_memory=True, **knobs)
        sync.release()
        sync.push(tensors.items(), 1)
        assert len(server.asked("resume_memory_occupation")) == 1 < ATTEMPTS


def test_what_was_lent_is_taken_back_once_where_the_run_ends_before_a_push(tmp_path):
    with FakeServer(**scripted()) as server:
        sync = IPCSync(
            [server.url], hf_folder=write_model(tmp_path / "m", 0), proof_folder=None, release_memory=True
        )
        sync.end_release()
        assert not server.asked("resume_memory_occupation")
        sync.release()
        sync.end_release()
        sync.end_release()
        resumed = server.asked("resume_memory_occupation")
    assert [body["tags"] for body in resumed] == [["weights", "cuda_graph"], ["kv_cache"]]


def test_memory_that_cannot_be_released_is_an_error(tmp_path):
    folder = write_model(tmp_path / "m", 0)
    with FakeServer(release_memory_occupation=[error(500)]) as server:
        sync = IPCSync([server.url], hf_folder=folder, proof_folder=None, timeout_s=10, release_memory=True)
        with pytest.raises(ServerError, match="release_memory_occupation was refused with HTTP 500"):
            sync.release()
        IPCSync([server.url], hf_folder=folder, proof_folder=None, timeout_s=10).release()
        assert len(server.asked("release_memory_occupation")) == 1  # not asked where it is off
