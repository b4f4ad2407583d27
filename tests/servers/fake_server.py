"""A stand-in for an SGLang server on a free loopback port, with scripted answers, and its replies."""

import base64
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]

VOCAB = 50


class FakeServer:
    """Answers a path with the scripted answers in turn, the last one for ever. Use as a context manager."""

    def __init__(self, **scripts: list[Answer]) -> None:
        scripts = {"model_info": [ok({"weight_version": "0"})]} | scripts
        self.scripts = {f"/{path}": list(answers) for path, answers in scripts.items()}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "FakeServer":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake._answer(self, {})

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                fake._answer(self, json.loads(self.rfile.read(size) or b"{}"))

            def log_message(self, *args: Any) -> None: ...

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.httpd.server_port}"

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.requests if asked == f"/{path}"]

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.requests.append((handler.path, body))
            script = self.scripts.get(handler.path, [ok({})])
            answer = script.pop(0) if len(script) > 1 else script[0]
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer(handler, body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self._lock:
                self.in_flight -= 1


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes, *, claimed: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if claimed is None else claimed))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def ok(content: Any, *, status: int = 200, after_s: float = 0.0) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        time.sleep(after_s)
        send(handler, status, json.dumps(content).encode())

    return answer


def raw(content: bytes) -> Answer:
    return lambda handler, body: send(handler, 200, content)


def cut_off(content: Any) -> Answer:
    """Half of the body, then a closed connection."""

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        whole = json.dumps(content).encode()
        handler.close_connection = True
        send(handler, 200, whole[: len(whole) // 2], claimed=len(whole))

    return answer


def error(status: int) -> Answer:
    return ok({"error": {"message": "scripted failure"}}, status=status)


def versions() -> dict[str, list[Answer]]:
    """Scripts of a weight version that is what it was told last, "default" at first."""
    told = ["default"]

    def take(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        told.append(body["new_version"])
        ok({})(handler, body)

    return dict(
        model_info=[lambda handler, body: ok({"weight_version": told[-1]})(handler, body)],
        update_weight_version=[take],
    )


def sample(
    *,
    length: int = 4,
    k: int = 3,
    version: str = "0",
    finish: str = "length",
    seed: int = 0,
    flat: bool = True,
) -> dict[str, Any]:
    """One completion as SGLang 0.5.23 sends it, top-k as base64 (flat) or as nested lists."""
    draw = np.random.default_rng(seed)
    ids = np.argsort(draw.random((length, VOCAB)), axis=1)[:, :k].astype(np.int32)
    logp = -np.sort(draw.random((length, k)).astype(np.float32) * 5, axis=1)
    tokens, sampled = ids[:, 0].tolist(), logp[:, 0].tolist()
    reason = {"type": finish, "length": length} if finish == "length" else {"type": finish, "matched": 2}
    meta: dict[str, Any] = {
        "id": "scripted",
        "finish_reason": reason,
        "weight_version": version,
        "weight_versions": [{"version": version, "start": 0, "end": length}],
        "output_token_logprobs": [[p, i, None] for p, i in zip(sampled, tokens, strict=True)],
    }
    meta |= flat_topk(ids, logp) if flat else {"output_top_logprobs": nested_topk(ids, logp)}
    return {"text": "", "output_ids": tokens, "meta_info": meta}


def flat_topk(ids: np.ndarray, logp: np.ndarray) -> dict[str, Any]:
    return {
        "output_top_logprobs_val_flat_b64": base64.b64encode(logp.astype("<f4").tobytes()).decode(),
        "output_top_logprobs_idx_flat_b64": base64.b64encode(ids.astype("<i4").tobytes()).decode(),
        "output_top_logprobs_val_flat_b64_dtype": "float32",
        "output_top_logprobs_idx_flat_b64_dtype": "int32",
        "output_top_logprobs_shape": list(ids.shape),
        "output_top_logprobs_null_prefix": 0,
    }


def nested_topk(ids: np.ndarray, logp: np.ndarray) -> list[list[list[Any]]]:
    return [
        [[float(p), int(i), None] for p, i in zip(*row, strict=True)] for row in zip(logp, ids, strict=True)
    ]


def group(n: int = 2, **knobs: Any) -> list[dict[str, Any]]:
    return [sample(seed=seed, **knobs) for seed in range(n)]
