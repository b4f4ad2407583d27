"""asyncio client of SGLang's /generate: a group's samples go to one server, least-loaded first, with retries.

Temperature is the only sampling transform: the server's log-probs are those of logits / temperature. Top-p,
top-k, min-p and penalties are switched off explicitly: servers may take defaults from generation_config.json.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import numpy as np

from megatron_jackpot.config.servers import CONTEXT_MARGIN
from megatron_jackpot.servers import api_key, reply
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import (
    Completion,
    JsonObject,
    Label,
    Sampling,
    ServerError,
    StaleWeights,
)

T = TypeVar("T")

NO_TRUNCATION = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
HEALTH_LIMIT_S = 10.0
REST_S = 10.0
"""How long a server that failed is avoided while another one is there."""


class RequestRejected(ServerError):
    """HTTP 4xx: the request itself is wrong, another server would say the same."""


@dataclass
class Server:
    """Load and health of one server as this client sees them."""

    url: str
    in_flight: int = 0
    rests_until: float = 0.0
    suspect: bool = False
    """Before it is asked again it must say that it holds the weights that were pushed last."""
    failed: bool = False
    """And show that it samples."""


class SGLangClient:
    """Completions from SGLang servers. Use as `async with SGLangClient(urls, ...) as client`.

    A request that fails (network, HTTP 5xx, time limit, malformed reply) is tried again with back-off, on
    another server where there is one. A request past its time limit is aborted by its ids. With a prefix
    cache, the samples of a group have ids that only the server knows: it ends them within seconds of the
    closed connection, which is also what happens to a cancelled request.

    A server starts a request with the weights that were pushed last, or has missed a push: `version` is
    theirs. A response may go on through pushes; how old its tokens may be is not judged here.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        vocab_size: int,
        context_length: int,
        concurrency: int = 256,
        request_timeout_s: float = 1800,
        retries: int = 3,
        version: int = 0,
        prefix_cache: bool = True,
        through_pushes: bool = False,
        backoff_s: float = 0.5,
    ) -> None:
        if not urls:
            raise ValueError("No server urls. Set servers.urls, or let `launch` start servers.")
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.request_timeout_s = request_timeout_s
        self.retries = retries
        self.version = version
        """Of the weights that were pushed last."""
        self.attempt: str | None = None
        """That pushed them; None before the first `use`."""
        self.prefix_cache = prefix_cache
        """Whether servers keep the keys and values of prompts."""
        self.through_pushes = through_pushes
        """Whether a push may fall within a response, whose reply then says which weights made which token."""
        self.backoff_s = backoff_s
        self._slots = {aside: asyncio.Semaphore(concurrency) for aside in (False, True)}
        """Of rollouts, and of probes and answers, which the main thread waits for."""
        self._open = asyncio.Event()
        self._open.set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=limits, headers=api_key.headers()
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def hold(self) -> None:
        """Begin no request until `use`; those that servers have go on."""
        self._open.clear()

    async def quiet(self) -> None:
        """Until servers have no request any more."""
        await self._quiet.wait()

    async def use(self, version: int, attempt: str = "") -> None:
        """Servers hold these weights now: begin requests again.

        Versions of one attempt only grow. In a new one a server that was left out of the push may hold
        weights of any number, from before: each says what it has once before it is asked for anything.
        """
        if attempt != self.attempt:
            for server in self.servers:
                server.suspect = True
        self.version, self.attempt = version, attempt
        self._open.set()

    async def generate_group(
        self,
        prompt_tokens: Sequence[int],
        n: int,
        sampling: Sampling,
        *,
        retried: Callable[[], None] = lambda: None,
        aside: bool = False,
    ) -> list[Completion]:
        """n samples of one prompt from one server; `retried` is called when the request is tried again.
        `aside` they do not queue behind the rollouts of steps ahead.

        Raises ValueError, ServerError or StaleWeights.
        """
        self._check(prompt_tokens, sampling.max_new_tokens, sampling.stop_token_ids)
        if sampling.top_k_logp > self.vocab_size:
            raise ValueError(
                f"top_k_logp = {sampling.top_k_logp} exceeds the vocabulary of {self.vocab_size} ids."
            )
        body = self._body(
            prompt_tokens,
            n,
            sampling.stop_token_ids,
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            ignore_eos=sampling.ignore_eos,
        )
        body |= {"return_logprob": True, "top_logprobs_num": sampling.top_k_logp}
        if sampling.top_k_logp:
            body |= {"return_flat_raw_output_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
        return await self._ask(
            body, n, lambda content, version: self._parse_group(content, n, sampling, version), retried, aside
        )

    async def answers(
        self,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        *,
        n: int = 1,
        temperature: float = 0.0,
    ) -> list[np.ndarray]:
        """n answers [R] int32 without log-probs, for evaluation; at temperature 0 the most probable one.
        They do not queue behind the rollouts of steps ahead."""
        self._check(prompt_tokens, max_new_tokens, stop_token_ids)
        body = self._body(
            prompt_tokens, n, stop_token_ids, temperature=temperature, max_new_tokens=max_new_tokens
        )
        return await self._ask(
            body,
            n,
            lambda content, version: self._parse_answers(content, n, max_new_tokens, version),
            aside=True,
        )

    def _body(
        self, prompt: Sequence[int], n: int, stop_token_ids: Sequence[int], **params: float
    ) -> JsonObject:
        """What /generate is asked for n samples.

        For `n` of one prompt SGLang first runs the bare prompt, so that all find its keys and values. Nobody
        would without a prefix cache: there the prompt is sent n times, for a sample each.
        """
        copies, each = (1, n) if self.prefix_cache else (n, 1)
        return {
            "input_ids": [[int(token) for token in prompt]] * copies,
            "sampling_params": {
                "n": each,
                "stop_token_ids": [int(token) for token in stop_token_ids],
                **params,
                **NO_TRUNCATION,
            },
        }

    def _check(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Sequence[int]) -> None:
        if len(prompt) == 0:
            raise ValueError("The prompt is empty: a server needs at least one token.")
        for field, ids in (("prompt", prompt), ("stop_token_ids", stop_token_ids)):
            wrong = [int(token) for token in ids if not 0 <= token < self.vocab_size]
            if wrong:
                # SGLang does not check ids: one outside the vocabulary takes the whole server down.
                raise ValueError(
                    f"{field} holds id {wrong[0]}, outside the vocabulary 0 .. {self.vocab_size - 1}."
                )
        if len(prompt) + max_new_tokens > self.context_length - CONTEXT_MARGIN:
            raise ValueError(
                f"prompt of {len(prompt)} tokens + max_new_tokens = {max_new_tokens} exceeds context_length "
                f"{self.context_length} - {CONTEXT_MARGIN}. Lower data.max_prompt_tokens or "
                "rollout.max_new_tokens."
            )

    async def _ask(
        self,
        body: JsonObject,
        weight: int,
        parse: Callable[[bytes, int], T],
        retried: Callable[[], None] = lambda: None,
        aside: bool = False,
    ) -> T:
        """`parse` gets the reply and the version it was asked of. Holds a slot from the first try on."""
        tried: set[str] = set()
        failure: ServerError | StaleWeights | None = None
        async with self._slots[aside]:
            for attempt in range(self.retries + 1):
                if attempt:
                    retried()
                    await asyncio.sleep(min(self.backoff_s * 2 ** (attempt - 1), 10.0))
                await self._open.wait()
                server = self._pick(tried)
                try:
                    while server.suspect:
                        await self._readmit(server)
                        await self._open.wait()
                        # Many may have waited for this one, and none was counted as its load.
                        server = self._pick(tried)
                    return await self._count_post(server, weight, body, parse)
                except RequestRejected:
                    raise
                except (ServerError, StaleWeights) as error:
                    failure = error
                    tried.add(server.url)
                    server.suspect = server.failed = True
                    server.rests_until = time.monotonic() + REST_S
        kind = StaleWeights if isinstance(failure, StaleWeights) else ServerError
        raise kind(f"/generate failed {self.retries + 1} times, last: {failure}") from failure

    async def _count_post(
        self, server: Server, weight: int, body: JsonObject, parse: Callable[[bytes, int], T]
    ) -> T:
        """`_post`, counted as in flight meanwhile."""
        server.in_flight += weight
        self._quiet.clear()
        try:
            return await self._post(server.url, body, parse)
        finally:
            server.in_flight -= weight
            if not any(one.in_flight for one in self.servers):
                self._quiet.set()

    async def _readmit(self, server: Server) -> None:
        """A server that was started anew holds the first weights until the next sync, and must not sample.

        Where a push begins meanwhile it stays suspect, to be asked again.
        """
        admin = ServerAdmin([server.url], timeout_s=HEALTH_LIMIT_S)
        (label,) = await admin.labels()
        if not self._open.is_set():
            return
        pushed = Label(self.version, label.attempt if self.attempt is None else self.attempt)
        if label != pushed:
            raise StaleWeights(
                f"{server.url} holds weight version {label}, not version {pushed}, the last one pushed."
            )
        if server.failed:
            await admin.samples(timeout_s=HEALTH_LIMIT_S)
        server.suspect = server.failed = False

    def _pick(self, tried: set[str]) -> Server:
        """Untried before tried, rested before failed, then the least loaded."""
        now = time.monotonic()
        return min(self.servers, key=lambda s: (s.url in tried, s.rests_until > now, s.in_flight))

    async def _post(self, url: str, body: JsonObject, parse: Callable[[bytes, int], T]) -> T:
        assert self._session is not None, "use the client inside `async with`"
        rids, version = [uuid.uuid4().hex for _ in body["input_ids"]], self.version
        # Cached prefixes are those of requests with the same key: none crosses versions.
        body = body | {"rid": rids, "extra_key": str(Label(version, self.attempt or ""))}
        try:
            async with asyncio.timeout(self.request_timeout_s):
                async with self._session.post(f"{url}/generate", json=body) as answer:
                    status, content = answer.status, await answer.read()
            if status != 200:
                rejected = 400 <= status < 500 and status not in (408, 429)
                kind = RequestRejected if rejected else ServerError
                raise kind(f"{url}: HTTP {status} from /generate: {content[:300].decode(errors='replace')}")
            return parse(content, version)
        except aiohttp.ClientError as error:
            raise ServerError(f"{url}: /generate broke off: {type(error).__name__}: {error}") from error
        except TimeoutError as error:
            await self._abort(url, rids)
            raise ServerError(f"{url}: no reply to /generate within {self.request_timeout_s:g} s") from error
        except reply.BadReply as error:
            raise ServerError(f"{url}: {error}") from error
        except StaleWeights as error:
            raise StaleWeights(f"{url}: {error}") from None

    async def _abort(self, url: str, rids: Sequence[str]) -> None:
        async def end(rid: str) -> None:
            # It was asked because it does not answer; the request's own error is the one to show.
            with suppress(ServerError):
                await ServerAdmin([url], timeout_s=5).abort(rid)

        await asyncio.gather(*(end(rid) for rid in rids))

    def _parse_group(self, content: bytes, n: int, sampling: Sampling, version: int) -> list[Completion]:
        group = reply.parse_group(
            content,
            n,
            sampling,
            vocab_size=self.vocab_size,
            attempt=self.attempt,
            spans=self.through_pushes,
        )
        for completion in group:
            _check_age(completion.weight_version, version)
        return group

    def _parse_answers(self, content: bytes, n: int, max_new_tokens: int, version: int) -> list[np.ndarray]:
        samples = reply.parse_samples(content, n)
        return [self._parse_answer(sample, max_new_tokens, version) for sample in samples]

    def _parse_answer(self, sample: JsonObject, max_new_tokens: int, version: int) -> np.ndarray:
        finish = reply.parse_finish(sample["meta_info"])
        if finish == "abort":
            raise reply.BadReply("the server aborted the request")
        tokens = reply.parse_tokens(sample, finish, max_new_tokens, vocab_size=self.vocab_size)
        if self.attempt is not None:
            _check_age(reply.parse_versions(sample["meta_info"], len(tokens), self.attempt), version)
        return tokens


def _check_age(versions: np.ndarray, version: int) -> None:
    """Raises StaleWeights where tokens are older than `version`, the last one pushed when they were asked
    for."""
    if len(versions) and versions.min() < version:
        raise StaleWeights(
            f"meta_info.weight_version = {versions.min()}, older than version {version}, the last one pushed "
            "when it was asked. The server missed a weight update."
        )
