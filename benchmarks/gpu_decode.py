"""Replies with top-20 log-probs of 1,048,576 tokens -> tensors (pinned where there is CUDA): base64 against
nested JSON.

    PYTHONPATH=. python benchmarks/gpu_decode.py [--tiny] [--tokens N]

`body` starts from the bytes of the HTTP reply (json.loads included), `top-k` from the parsed object: what is
left is the difference between the two forms. Replies hold 1024 tokens each; the tokens' own log-probs are the
same in both.
Seconds are CPU time of the one thread that does it, the least of five runs. Nested JSON is measured on a
sixteenth of the tokens; the ratio is that of tokens per second.
"""

import base64
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu_common import DEVICE, Report, parser
from megatron_jackpot.servers.protocol import Sampling
from megatron_jackpot.servers.reply import parse_group, parse_topk

K, PER_REPLY, VOCAB = 20, 1024, 151_936


def reply(form: str, tokens: int) -> bytes:
    """A body as SGLang writes it: flat base64, which the client asks for, or nested lists."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCAB, (tokens, K)).astype("<i4")
    logp = -np.sort(generator.exponential(2.0, (tokens, K))).astype("<f4")
    sampled = [[float(row[0]), int(row_ids[0]), None] for row, row_ids in zip(logp, ids, strict=True)]
    meta = dict(finish_reason=dict(type="length"), output_token_logprobs=sampled, weight_version="0")
    if form == "base64":
        meta |= dict(output_top_logprobs_shape=[tokens, K], output_top_logprobs_null_prefix=0)
        for kind, array, dtype in (("idx", ids, "int32"), ("val", logp, "float32")):
            field = f"output_top_logprobs_{kind}_flat_b64"
            meta |= {field: base64.b64encode(array.tobytes()).decode(), f"{field}_dtype": dtype}
    else:
        rows = zip(logp.tolist(), ids.tolist(), strict=True)
        meta["output_top_logprobs"] = [
            [[value, token, None] for value, token in zip(*row, strict=True)] for row in rows
        ]
    return json.dumps([dict(output_ids=ids[:, 0].tolist(), meta_info=meta)]).encode()


def cpu_seconds(call: Callable[[], None]) -> float:
    times = []
    for _ in range(5):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def to_tensors(ids: np.ndarray, logp: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    pinned = DEVICE.type == "cuda"
    made = [torch.empty(array.shape, dtype=dtype, pin_memory=pinned) for array, dtype in _typed(ids, logp)]
    for tensor, array in zip(made, (ids, logp), strict=True):
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    return made[0], made[1]


def _typed(ids: np.ndarray, logp: np.ndarray):
    return (ids, torch.int32), (logp, torch.float32)


def measure(form: str, tokens: int, num_replies: int) -> list[dict]:
    body = reply(form, tokens)
    sampling = Sampling(max_new_tokens=tokens, temperature=1.0, top_k_logp=K)
    meta = json.loads(body)[0]["meta_info"]

    def whole() -> None:
        for _ in range(num_replies):
            done = parse_group(body, 1, sampling, vocab_size=VOCAB)[0]
            to_tensors(done.topk_ids, done.topk_logp)

    def topk() -> None:
        for _ in range(num_replies):
            ids, logp, _ = parse_topk(meta, tokens, K, VOCAB)
            to_tensors(ids, logp)

    rows = []
    for what, call in (("body", whole), ("top-k", topk)):
        time_s = cpu_seconds(call)
        count = tokens * num_replies
        rows.append(
            dict(
                what=what,
                form=form,
                tokens=count,
                s=time_s,
                tokens_s=count / time_s,
                bytes_per_token=len(body) / tokens,
            )
        )
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=2**20)
    args = made.parse_args()
    per_reply = 64 if args.tiny else PER_REPLY
    replies = 2 if args.tiny else max(1, args.tokens // per_reply)
    rows = measure("base64", per_reply, replies) + measure("nested", per_reply, max(1, replies // 16))
    for what in ("body", "top-k"):
        rate = {row["form"]: row["tokens_s"] for row in rows if row["what"] == what}
        rows.append(dict(what=what, form="ratio", ratio=rate["base64"] / rate["nested"]))
    report = Report("gpu_decode", tiny=args.tiny)
    report.add(*rows)
    report.close()


if __name__ == "__main__":
    main()
