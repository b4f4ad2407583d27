"""What a top-k costs a server: tokens per second at k = 0, 5 and 20, and where a decode step's time goes.

    PYTHONPATH=. python benchmarks/gpu_servers.py [--tiny] [-- SERVER FLAGS]

Stock SGLang, Qwen3-0.6B's shape with random weights in bf16, 64 and 256 responses of 256 tokens at once,
requests as servers/client.py sends them. Twice: as SGLang starts, and with --disable-overlap-schedule. `step`
rows are of SGLang's own profile of decode steps with 256 responses: kernels' time, copies to the host and
waits for the device, each per step.
"""

import asyncio
import gzip
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.gpu_common import DEVICE, QWEN3_0_6B, TINY, Report, parser
from megatron_jackpot.config import Servers
from megatron_jackpot.servers.client import NO_TRUNCATION
from megatron_jackpot.servers.gpus import place_servers
from megatron_jackpot.servers.process import start_servers
from tests.tiny import write_model

PROMPT = 64
PROFILED_STEPS = 12
LIMIT_S = 120
START_LIMIT_S = 300
SCHEDULES = {"overlap": (), "no overlap": ("--disable-overlap-schedule",)}


def body(vocab: int, index: int, tokens: int, k: int) -> dict:
    prompt = np.random.default_rng(index).integers(3, vocab, PROMPT).tolist()
    sampling = dict(n=1, temperature=1.0, max_new_tokens=tokens, ignore_eos=True, **NO_TRUNCATION)
    flat = dict(return_flat_raw_output_top_logprobs=True, return_flat_raw_top_logprobs_b64=True) if k else {}
    return dict(input_ids=prompt, sampling_params=sampling, return_logprob=True, top_logprobs_num=k, **flat)


async def sample(url: str, bodies: list[dict], beside=None) -> tuple[float, int]:
    """(seconds until every body is answered, bytes of the answers); `beside` runs meanwhile."""
    limits = aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits) as session:

        async def one(content: dict) -> int:
            async with session.post(f"{url}/generate", json=content) as answer:
                answer.raise_for_status()
                return len(await answer.read())

        start = time.perf_counter()
        sizes = [asyncio.create_task(one(content)) for content in bodies]
        if beside is not None:
            await beside(session)
        total = sum(await asyncio.gather(*sizes))
        return time.perf_counter() - start, total


async def profiled(url: str, bodies: list[dict], folder: Path) -> dict:
    """Per decode step: kernel milliseconds, waits, copies to the host, and the dearest kernels."""

    async def record(session: aiohttp.ClientSession) -> None:
        await asyncio.sleep(1.0)  # past prefill
        asked = dict(output_dir=str(folder), num_steps=PROFILED_STEPS, activities=["CPU", "GPU"])
        async with session.post(f"{url}/start_profile", json=asked) as answer:
            answer.raise_for_status()

    await sample(url, bodies, record)
    end = time.monotonic() + 30
    while not (traces := sorted(folder.rglob("*.trace.json.gz"))) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    if not traces:
        raise TimeoutError(f"SGLang wrote no profile below {folder} within 30 s.")
    await asyncio.sleep(1.0)
    return summary(json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"])


def summary(events: list[dict]) -> dict:
    kernels, calls = defaultdict(float), defaultdict(int)
    for event in events:
        if event.get("cat") == "kernel":
            kernels[event["name"]] += event["dur"]
        elif event.get("cat") in ("cuda_runtime", "cpu_op", "gpu_memcpy"):
            calls[event["name"]] += 1
    dearest = sorted(kernels, key=lambda name: -kernels[name])[:6]
    return dict(
        kernel_ms=sum(kernels.values()) / PROFILED_STEPS / 1e3,
        topk_ms=sum(
            time for name, time in kernels.items() if "topk" in name.lower() or "sort" in name.lower()
        )
        / PROFILED_STEPS
        / 1e3,
        to_host=calls["Memcpy DtoH (Device -> Pinned)"] / PROFILED_STEPS
        + calls["Memcpy DtoH (Device -> Pageable)"] / PROFILED_STEPS,
        waits=sum(calls[name] for name in calls if "Synchronize" in name) / PROFILED_STEPS,
        slices=calls["aten::slice"] / PROFILED_STEPS,
        dearest="; ".join(f"{kernels[name] / PROFILED_STEPS / 1e3:.2f} ms {name[:40]}" for name in dearest),
    )


def measure(report: Report, schedule: str, flags: list[str], model: Path, vocab: int, *, tiny: bool) -> None:
    tokens, at_once = (8, (2,)) if tiny else (256, (64, 256))
    with tempfile.TemporaryDirectory() as scratch:
        settings = Servers(extra_args=(*flags, *SCHEDULES[schedule]), start_timeout_s=START_LIMIT_S)
        started = time.monotonic()
        dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
        servers = start_servers(settings, model, place_servers(settings), Path(scratch), dtype=dtype)
        try:
            url = servers[0].url
            report.add(dict(what="start", schedule=schedule, s=time.monotonic() - started))
            for count in at_once:
                asyncio.run(sample(url, [body(vocab, i, 16, 20) for i in range(count)]))
                for k in (0, 5, 20):
                    s, size = asyncio.run(sample(url, [body(vocab, i, tokens, k) for i in range(count)]))
                    rate = count * tokens / s
                    row = dict(what="rate", schedule=schedule, at_once=count, k=k, s=s, tokens_s=rate)
                    report.add({**row, "bytes_token": size / count / tokens})
            for k in (0, 20) if not tiny else ():
                folder = Path(scratch, f"profile-{k}")
                bodies = [body(vocab, i, tokens, k) for i in range(at_once[-1])]
                try:
                    row = asyncio.run(profiled(url, bodies, folder))
                except (TimeoutError, aiohttp.ClientError, KeyError) as error:
                    row = dict(failed=repr(error)[:100])
                report.add(dict(what="step", schedule=schedule, at_once=at_once[-1], k=k, **row))
        finally:
            for server in servers:
                server.stop()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    made.add_argument("flags", nargs="*", help="of sglang.launch_server, after --")
    args = made.parse_args()
    shape = TINY if args.tiny else {**QWEN3_0_6B, "torch_dtype": "bfloat16"}
    report = Report("gpu_servers", tiny=args.tiny)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch, "model"), 0, **shape)
        for schedule in args.schedules:
            measure(report, schedule, args.flags, model, shape["vocab_size"], tiny=args.tiny)
    report.close()


if __name__ == "__main__":
    main()
