"""The key that servers ask for when others than this machine can reach them; the environment carries it."""

import ipaddress
import os
import secrets

VARIABLE = "JACKPOT_API_KEY"
"""Set it for servers and trainer alike; `launch` makes one where servers bind beyond loopback and none is
set."""


def headers() -> dict[str, str]:
    """What an HTTP request to a server carries."""
    key = os.environ.get(VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def arguments() -> list[str]:
    """What a server is started with. The key shows in its command line to users of the same machine."""
    key = os.environ.get(VARIABLE)
    # One word: a key may begin with a dash.
    return [f"--api-key={key}"] if key else []


def provide(host: str) -> None:
    """Make a key, for this process and its children, where servers at `host` need one and there is none."""
    if not _is_loopback(host):
        os.environ.setdefault(VARIABLE, secrets.token_urlsafe(32))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
