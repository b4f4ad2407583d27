"""Control calls to SGLang servers: health, pause, weight updates, checksums. Time limits everywhere.

A call goes to all servers side by side; `ServerAdmin([url])` speaks to one. Sessions live for one call, so
the methods may run on any event loop (`asyncio.run(admin.pause())` in synchronous code).
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Literal

import aiohttp

from megatron_jackpot.servers import api_key
from megatron_jackpot.servers.protocol import JsonObject, Label, ServerError
from megatron_jackpot.servers.reply import parse_label

PauseMode = Literal["abort", "retract"]


class ServerAdmin:
    """Control of servers at `urls`. Answers come one per server, in their order. Raises ServerError."""

    def __init__(self, urls: Sequence[str], *, timeout_s: float = 60) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout_s = timeout_s

    async def alive(self, timeout_s: float = 10, scheduler_s: float | None = None) -> list[str]:
        """Their schedulers answer, also while they are paused or have lent their memory; nothing is sampled.

        What each says its weight version is: "default" where nobody has told it one since it was started.
        """
        infos = await self._all("GET", "/model_info", timeout_s=timeout_s)
        said = [str(info.get("weight_version")) for info in infos]
        # Of the requests that the scheduler itself answers this is the cheapest: it is told what it says.
        # /server_info, which writes out all settings, was a fifth of a push on a CPU.
        bodies: list[JsonObject] = [{"new_version": version, "abort_all_requests": False} for version in said]
        await self._all("POST", "/update_weight_version", bodies, timeout_s=scheduler_s or timeout_s)
        return said

    async def samples(self, timeout_s: float = 10) -> None:
        """They sample a token; a second at least, and no answer while they are paused or have lent memory."""
        await self._all("GET", "/health_generate", timeout_s=timeout_s)

    async def model_info(self) -> list[JsonObject]:
        return await self._all("GET", "/model_info")

    async def labels(self) -> list[Label]:
        """What each server says its weights are; "default" counts as version 0."""
        return [parse_label(info.get("weight_version")) for info in await self.model_info()]

    async def tp_sizes(self) -> list[int]:
        return [int(info["tp_size"]) for info in await self._all("GET", "/server_info")]

    async def memory_gib(self) -> list[float]:
        """Weights, KV cache and graphs of each server's fullest GPU, as it says itself; without the parts it
        does not know."""
        return [
            max((_held_gib(state) for state in info.get("internal_states", ())), default=0.0)
            for info in await self._all("GET", "/server_info")
        ]

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Stop sampling.

        retract: running requests are prefilled again under the new weights, so the cache can be flushed.
        abort: they end.
        """
        await self._all("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """On every server that answers, whatever another one does."""
        await self._all("POST", "/continue_generation", {"torch_empty_cache": False}, until_all=True)

    async def abort(self, rid: str) -> None:
        await self._all("POST", "/abort_request", {"rid": rid})

    async def abort_all(self) -> None:
        """On every server that answers, whatever another one does."""
        await self._all("POST", "/abort_request", {"abort_all": True}, until_all=True)

    async def update_from_disk(self, path: str) -> None:
        # Named, because a server may have been started with weights of the format "dummy".
        body: JsonObject = {"model_path": path, "load_format": "auto", "flush_cache": True}
        await self._all("POST", "/update_weights_from_disk", body)

    async def begin_update(self) -> None:
        await self._all("POST", "/begin_weight_update", {})

    async def end_update(self) -> None:
        await self._all("POST", "/end_weight_update", {})

    async def init_group(
        self, *, host: str, port: int, rank_offsets: Sequence[int], world_size: int, name: str, backend: str
    ) -> None:
        """Each server joins the weight group from its own rank offset on; returns when the group stands."""
        shared = {
            "master_address": host,
            "master_port": port,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        bodies = [shared | {"rank_offset": offset} for offset in rank_offsets]
        await self._all("POST", "/init_weights_update_group", bodies)

    async def destroy_group(self, name: str) -> None:
        """On every server that answers, whatever another one does."""
        await self._all("POST", "/destroy_weights_update_group", {"group_name": name}, until_all=True)

    async def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group: str,
        load_format: str | None = None,
        flush: bool = False,
    ) -> None:
        """Receive one broadcast; the reply comes after it, so send and ask side by side.

        `flush` drops cached prefixes; the server refuses while requests hold them.
        """
        body: JsonObject = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "flush_cache": flush,
            "load_format": load_format,
        }
        await self._all("POST", "/update_weights_from_distributed", body)

    async def update_from_tensor(self, serialised: Sequence[Sequence[str]], *, flush: bool = False) -> None:
        """Flattened buckets in base64: per server, one for each of its ranks (sync/ipc.py)."""
        shared = {"load_format": "flattened_bucket", "flush_cache": flush}
        bodies = [shared | {"serialized_named_tensors": list(ranks)} for ranks in serialised]
        await self._all("POST", "/update_weights_from_tensor", bodies)

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Give back GPU memory. An idle server only: a busy one refuses, with an assertion that ends it."""
        await self._all("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take memory again that was released; its content is lost, but for what SGLang calls static
        state."""
        await self._all("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def set_label(self, label: Label) -> None:
        body = {"new_version": str(label), "abort_all_requests": False}
        await self._all("POST", "/update_weight_version", body)

    async def checksums(self) -> list[dict[str, dict[str, str]]]:
        """Per server: "tp0 pp0" -> {the server's tensor name -> its hash}."""
        answers = await self._all("POST", "/weights_checker", {"action": "checksum"})
        return [{_rank_name(rank): rank["checksums"] for rank in answer["ranks"]} for answer in answers]

    async def _all(
        self,
        method: str,
        path: str,
        body: JsonObject | list[JsonObject] | None = None,
        *,
        timeout_s: float | None = None,
        until_all: bool = False,
    ) -> list[JsonObject]:
        """One body for all servers, or a list of one each. The first failure ends the call, with `until_all`
        after every server has answered or failed."""
        bodies = body if isinstance(body, list) else [body] * len(self.urls)
        limit = self.timeout_s if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=limit)
        async with aiohttp.ClientSession(timeout=timeout, headers=api_key.headers()) as session:
            calls = [
                asyncio.ensure_future(_call(session, method, url, path, own_body, limit))
                for url, own_body in zip(self.urls, bodies, strict=True)
            ]
            try:
                if until_all:
                    await asyncio.wait(calls)
                return await asyncio.gather(*calls)
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)


async def _call(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    path: str,
    body: JsonObject | None,
    limit: float,
) -> JsonObject:
    """The answer; one that is no JSON object, as of /health, counts as an empty one."""
    try:
        async with session.request(method, url + path, json=body) as answer:
            status, text = answer.status, await answer.text()
    except TimeoutError as error:
        raise ServerError(f"{url}: no reply to {method} {path} within {limit:g} s") from error
    except aiohttp.ClientError as error:
        raise ServerError(f"{url}: {method} {path} failed: {type(error).__name__}: {error}") from error
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    if status != 200 or (isinstance(content, dict) and content.get("success") is False):
        raise ServerError(f"{url}: {method} {path} was refused with HTTP {status}: {text[:500]}")
    return content if isinstance(content, dict) else {}


def _held_gib(state: JsonObject) -> float:
    usage = state.get("memory_usage", {})
    parts = [usage.get(part) for part in ("weight", "kvcache", "graph")]
    return float(sum(part for part in parts if isinstance(part, (int, float))))


def _rank_name(rank: JsonObject) -> str:
    place = rank["parallelism_info"][0]  # One entry per model of the rank, the served one first.
    return f"tp{place['tp_rank']} pp{place['pp_rank']}"
