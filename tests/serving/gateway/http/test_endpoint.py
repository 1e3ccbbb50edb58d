"""The port of a service, from the check before its start on."""

import pytest

from serving.gateway.http.endpoint import StartError, check_port_is_free, port_reserved
from tests.support.running_gateway import free_port, running


async def test_a_port_is_its_services_from_the_check_on():
    """Gateways that come later listen on it; a second service finds it taken at once."""
    port = free_port()
    check_port_is_free("127.0.0.1", port)
    with port_reserved("127.0.0.1", port):
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}"):
            check_port_is_free("127.0.0.1", port)
        async with running(num_engines=1, gateway={"port": port}) as system:
            for _ in range(20):  # each on a connection that any listener might be dealt
                reply = await system.client.get(
                    f"http://127.0.0.1:{port}/ping", headers={"connection": "close"}
                )
                assert reply.status_code == 200
    check_port_is_free("127.0.0.1", port)
