"""What the supervisor does with its servers, without any: stand-ins that note what they are asked."""

from types import SimpleNamespace

from megatron_jackpot.config.servers import Servers
from megatron_jackpot.servers.supervisor import Supervisor


def test_servers_that_are_renewed_are_ended_at_once_and_started_by_the_next_look_which_is_no_restart() -> (
    None
):
    asked: list[str] = []
    server = SimpleNamespace(
        url="http://here:1",
        running=True,
        stop=lambda grace_s: asked.append(f"stop in {grace_s}"),
        start=lambda: asked.append("start"),
        answers=lambda limit_s, path: True,
    )
    said: list[str] = []
    supervisor = Supervisor([server, server], Servers(max_restarts=0), said.append)
    supervisor.renew("its memory is lent")
    assert asked == ["stop in 0"] * 2 and len(said) == 2
    assert supervisor.look() and asked[2:] == ["start"] * 2
    assert supervisor.look() and len(asked) == 4
