"""Short ways to ask a gateway for what its cache may keep."""

from tests.support.running_gateway import CHAT

ON = {"enabled": True}


def ask(system, headers=None, **fields):
    body = system.chat(**{"temperature": 0, "max_tokens": 5, **fields})
    return system.client.post(CHAT, json=body, headers=headers)


def num_started(system) -> int:
    return sum(engine.num_started for engine in system.engines)
