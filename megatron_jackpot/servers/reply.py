"""Replies of SGLang's /generate -> checked Completions. Nothing is mended silently: counted, or an error.

Shapes: R response tokens of one completion, K top-k entries per token.
"""

import base64
from typing import Any

import numpy as np
from pydantic_core import from_json

from megatron_jackpot.servers.protocol import (
    BadReply,
    Completion,
    JsonObject,
    Label,
    Sampling,
    StaleWeights,
)

LARGEST_LOGP = 1e-3
"""Rounding may lift a log-prob of certainty above 0; more than this is no log-prob."""


def parse_group(
    body: bytes,
    n: int,
    sampling: Sampling,
    *,
    vocab_size: int,
    attempt: str | None = None,
    spans: bool = False,
) -> list[Completion]:
    """The n completions of one reply; with `spans` it must say for each token which weights made it. Raises
    BadReply, and StaleWeights where a token is of weights of another attempt; None takes them as well."""
    return [
        parse_completion(sample, sampling, vocab_size=vocab_size, attempt=attempt, spans=spans)
        for sample in parse_samples(body, n)
    ]


def parse_samples(body: bytes, n: int) -> list[JsonObject]:
    """JSON body -> n sample objects."""
    try:
        # A third of json's time.
        reply = from_json(body)
    except ValueError as error:
        raise BadReply(
            f"reply of {len(body)} bytes is not JSON (ends with {body[-40:]!r}): {error}"
        ) from error
    samples = reply if isinstance(reply, list) else [reply]
    if len(samples) != n:
        raise BadReply(f"reply has {len(samples)} completions, expected {n}")
    for sample in samples:
        if not isinstance(sample, dict) or not isinstance(sample.get("meta_info"), dict):
            raise BadReply(f"completion has no meta_info object: {str(sample)[:200]}")
    return samples


def parse_completion(
    sample: JsonObject,
    sampling: Sampling,
    *,
    vocab_size: int,
    attempt: str | None = None,
    spans: bool = False,
) -> Completion:
    meta = sample["meta_info"]
    finish = parse_finish(meta)
    tokens = parse_tokens(sample, finish, sampling.max_new_tokens, vocab_size=vocab_size)
    if len(tokens) == 0:
        return _empty(finish, sampling.top_k_logp)
    server_logp, valid = _sampled_logp(meta, tokens)
    topk_ids, topk_logp, num_dropped = parse_topk(meta, len(tokens), sampling.top_k_logp, vocab_size)
    return Completion(
        tokens=tokens,
        server_logp=server_logp,
        topk_ids=topk_ids,
        topk_logp=topk_logp,
        valid=valid,
        # What was aborted is sampled anew, and SGLang sends no spans where its own time limits end it.
        weight_version=parse_versions(meta, len(tokens), attempt, wanted=spans and finish != "abort"),
        finish=finish,
        num_dropped_topk=num_dropped,
    )


def parse_finish(meta: JsonObject) -> str:
    reason = meta.get("finish_reason")
    finish = reason.get("type") if isinstance(reason, dict) else None
    if finish not in ("stop", "length", "abort"):
        raise BadReply(f"meta_info.finish_reason = {reason!r}: its type must be stop, length or abort")
    return finish


def parse_tokens(sample: JsonObject, finish: str, max_new_tokens: int, *, vocab_size: int) -> np.ndarray:
    """Checked output_ids [R] int32; only an aborted completion may be empty."""
    tokens = _integers(sample.get("output_ids"), "output_ids")
    if len(tokens) > max_new_tokens or (len(tokens) == 0 and finish != "abort"):
        raise BadReply(f"output_ids has {len(tokens)} tokens, expected 1 .. {max_new_tokens}")
    if finish == "length" and len(tokens) != max_new_tokens:
        raise BadReply(
            f"output_ids has {len(tokens)} tokens but finished by length, expected max_new_tokens = "
            f"{max_new_tokens}; the server's KV cache or context may be smaller than prompt + max_new_tokens"
        )
    _check_ids(tokens, "output_ids", vocab_size)
    return tokens


def parse_label(said: object) -> Label:
    """What a server says its weights are. One that was never updated says "default", which is version 0."""
    if said == "default":
        return Label(0)
    version, _, attempt = str(said).partition("@")
    try:
        number = int(version)
    except ValueError:
        number = -1
    if not 0 <= number < 2**31:
        raise BadReply(
            f"weight_version = {said!r}: expected an int32 from 0 on, or one with @ATTEMPT, or 'default'"
        )
    return Label(number, attempt)


def _integers(values: object, field: str) -> np.ndarray:
    try:
        array = np.array(values)
        if array.ndim != 1 or (array.size and array.dtype.kind != "i"):
            raise ValueError
        if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
            raise ValueError
    except (ValueError, OverflowError):
        raise BadReply(f"{field} = {str(values)[:100]}: expected a list of int32") from None
    return array.astype(np.int32)


def _check_ids(ids: np.ndarray, field: str, vocab_size: int) -> None:
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise BadReply(f"{field} holds {int(ids[outside][0])}: outside 0 .. {vocab_size - 1}")


def _check_logp(logp: np.ndarray, field: str) -> None:
    if logp.size and logp.max() > LARGEST_LOGP:
        raise BadReply(f"{field} holds {float(logp.max())}: a log-prob is not positive")


def _sampled_logp(meta: JsonObject, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logp [R] with 0 where not finite, valid [R]). SGLang writes NaN as null."""
    field = "meta_info.output_token_logprobs"
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(tokens):
        count = len(entries) if isinstance(entries, list) else entries
        raise BadReply(f"{field} has {count} entries, expected {len(tokens)}, one per output id")
    try:
        with np.errstate(over="ignore"):  # Too large for fp32 is not finite, which is counted.
            logp = np.array([entry[0] for entry in entries], dtype=np.float32)
        if logp.ndim != 1:
            raise ValueError
        ids = _integers([entry[1] for entry in entries], field)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        raise BadReply(f"{field} must hold [logp, id, text] entries, got {str(entries[0])[:80]}") from None
    if not np.array_equal(ids, tokens):
        raise BadReply(f"{field} speaks about other ids than output_ids")
    valid = np.isfinite(logp)
    _check_logp(logp[valid], field)
    return np.where(valid, logp, np.float32(0)), valid


def parse_topk(meta: JsonObject, rows: int, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids [R, K], logp [R, K], number of NaN entries turned into padding). SGLang leaves the fields out at
    k = 0, and what a server sends uncalled is not read."""
    if k == 0:
        return np.empty((rows, 0), np.int32), np.empty((rows, 0), np.float32), 0
    if "output_top_logprobs_val_flat_b64" in meta:
        ids, logp = _flat_topk(meta, rows, k)
    elif isinstance(meta.get("output_top_logprobs"), list):
        ids, logp = _nested_topk(meta["output_top_logprobs"], rows, k)
    else:
        raise BadReply("meta_info has neither output_top_logprobs_val_flat_b64 nor output_top_logprobs")
    padding = ~np.isfinite(logp)
    num_dropped = int((padding & ~np.isneginf(logp)).sum())
    _check_logp(logp[~padding], "meta_info.output_top_logprobs")
    _check_ids(ids[~padding], "meta_info.output_top_logprobs ids", vocab_size)
    return np.where(padding, np.int32(-1), ids), np.where(padding, np.float32(-np.inf), logp), num_dropped


def _flat_topk(meta: JsonObject, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    shape, prefix = meta.get("output_top_logprobs_shape"), meta.get("output_top_logprobs_null_prefix")
    if shape != [rows, k] or prefix != 0:
        raise BadReply(
            f"meta_info.output_top_logprobs_shape = {shape} after a null prefix of {prefix}, "
            f"expected [{rows}, {k}] after 0"
        )
    ids = _decode(meta, "idx", "int32", rows * k).reshape(rows, k)
    return ids, _decode(meta, "val", "float32", rows * k).reshape(rows, k)


def _decode(meta: JsonObject, kind: str, dtype: str, size: int) -> np.ndarray:
    field = f"output_top_logprobs_{kind}_flat_b64"
    if meta.get(f"{field}_dtype") != dtype:
        raise BadReply(f"meta_info.{field}_dtype = {meta.get(f'{field}_dtype')!r}, expected {dtype!r}")
    try:
        raw = base64.b64decode(meta[field], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BadReply(f"meta_info.{field} is not base64: {error}") from error
    if len(raw) != size * 4:
        raise BadReply(f"meta_info.{field} holds {len(raw)} bytes, expected {size * 4}")
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<"))


def _nested_topk(entries: list[Any], rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The form of older servers: [[[logp, id, text] * K] * R]."""
    try:
        logp = np.array([[entry[0] for entry in row] for row in entries], dtype=np.float32)
        ids = np.array([[entry[1] for entry in row] for row in entries], dtype=np.int32)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise BadReply(f"meta_info.output_top_logprobs is not [R][K][logp, id, text]: {error}") from error
    if logp.shape != (rows, k):
        raise BadReply(f"meta_info.output_top_logprobs has shape {list(logp.shape)}, expected [{rows}, {k}]")
    return ids, logp


def parse_versions(meta: JsonObject, rows: int, attempt: str | None, *, wanted: bool = False) -> np.ndarray:
    """[R] int32 from the spans of the reply; without any, unless they are wanted, its one version, which is
    that of its end. Raises as `parse_group`."""
    spans = meta.get("weight_versions")
    if spans is None and wanted:
        raise BadReply(
            "meta_info has no weight_versions, but a push may fall within a response (rollout.ahead > 0): "
            "nobody knows which weights made which token. SGLang 0.5.23 sends them: use it, or set "
            "rollout.ahead=0"
        )
    if spans is None:
        return np.full(rows, _version(meta.get("weight_version"), attempt), dtype=np.int32)
    versions, end = np.empty(rows, dtype=np.int32), 0
    try:
        for span in spans:
            if span["start"] != end or not end < span["end"] <= rows:
                raise ValueError
            versions[end : span["end"]] = _version(span["version"], attempt)
            end = span["end"]
        if end != rows:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise BadReply(f"meta_info.weight_versions = {str(spans)[:200]}: must cover 0 .. {rows}") from None
    return versions


def _version(said: object, attempt: str | None) -> int:
    label = parse_label(said)
    if attempt is not None and label.attempt != attempt:
        raise StaleWeights(
            f"meta_info says weights {label}, not of attempt {attempt!r}, the one under way. The server "
            "missed its weight updates."
        )
    return label.version


def _empty(finish: str, k: int) -> Completion:
    return Completion(
        tokens=np.empty(0, np.int32),
        server_logp=np.empty(0, np.float32),
        topk_ids=np.empty((0, k), np.int32),
        topk_logp=np.empty((0, k), np.float32),
        valid=np.empty(0, bool),
        weight_version=np.empty(0, np.int32),
        finish=finish,
    )
