"""Whether what a launch starts on this machine can be started, and at the ports it is to have."""

import os
from collections.abc import Iterator
from contextlib import suppress

from megatron_jackpot.config import Logging, Servers
from megatron_jackpot.servers.address import LAST_PORT, free_port, port_is_free


def server_mistakes(servers: Servers) -> Iterator[str]:
    """What keeps servers from being started here."""
    if servers.python is not None and servers.python.is_dir():
        yield (
            f"servers.python = {servers.python} is a folder. Set it to the interpreter in it: "
            f"{servers.python / 'bin' / 'python'}."
        )
    elif servers.python is not None and not os.access(servers.python, os.X_OK):
        yield f"servers.python = {servers.python} is no program. Set it to the interpreter that has SGLang."
    try:
        free_port(servers.host)
    except ValueError as error:
        yield str(error)
        return
    ports = range(servers.port, servers.port + servers.num) if servers.port else ()
    if ports and ports[-1] > LAST_PORT:
        yield (
            f"servers.port = {servers.port} leaves no room for servers.num = {servers.num} below port "
            f"{LAST_PORT}. Lower it, or set it to 0."
        )
    for port in ports:
        if port <= LAST_PORT and not port_is_free(servers.host, port):
            yield (
                f"Port {port} on {servers.host} is in use: no server can start there. "
                "Set servers.port to a free one, or to 0 to have one chosen."
            )


def prometheus_mistakes(logging: Logging) -> Iterator[str]:
    """What keeps the metrics' endpoint from being opened here."""
    host, port = logging.prometheus_host, logging.prometheus_port
    with suppress(ValueError):
        if port is None or port_is_free(host, port):
            return
    yield f"logging.prometheus_port = {port}: in use on {host}, or that is not here. Set another, or null."
