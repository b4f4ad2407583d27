"""Hosts and ports of servers, IPv4 or IPv6."""

import socket
from typing import Any

from megatron_jackpot.config import ConfigError

LAST_PORT = 65535
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that bind to every interface -> where such a server is reached from this machine."""


def url_of(host: str, port: int) -> str:
    """Where a server bound to `host` is reached."""
    host = EVERYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now. Raises ConfigError where this machine has no such address."""
    family, address = _resolve(host, 0)
    try:
        with socket.socket(family) as probe:
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise _not_here(host, error) from error


def port_is_free(host: str, port: int) -> bool:
    """Whether a server can listen there. Raises ConfigError for a host that does not resolve."""
    family, address = _resolve(host, port)
    with socket.socket(family) as probe:
        # As servers do: a closed connection that still lingers on the port does not block a new listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
        return True


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise _not_here(host, error) from error
    return family, address


def _not_here(host: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"servers.host = '{host}' is no address that servers can bind to here ({error}). Set it to one of "
        "this machine's, without brackets: 127.0.0.1, ::1, 0.0.0.0."
    )
