"""What admins change is in the log, with who did it and from where."""

import logging

from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.running_gateway import running


async def test_who_changes_something_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "serving.audit")
    headers = {}
    with KeysFile(tmp_path / "keys.json") as file:
        for tenant, admin in (("acme", False), ("ops", True)):
            text, key = make_key(tenant, admin=admin)
            file.keys.append(key)
            headers[tenant] = {"authorization": f"Bearer {text}"}
        file.save()
    async with running(num_engines=0, auth={"keys_file": str(tmp_path / "keys.json")}) as system:
        for tenant, status in (("acme", 403), ("ops", 200)):
            for path, body in (
                ("/headway/policy", {"policy": "headway", "ablate": ["order"]}),
                ("/headway/reload", None),
            ):
                reply = await system.client.post(path, json=body, headers=headers[tenant])
                assert reply.status_code == status
        reply = await system.client.post(
            "/headway/policy", json={"policy": "none"}, headers=headers["ops"]
        )
        assert reply.status_code == 400
    assert [record.getMessage() for record in caplog.records if record.name == "serving.audit"] == [
        "ops at 127.0.0.1 set the policy to headway without order",
        "ops at 127.0.0.1 reloaded keys and config",
    ]


async def test_without_keys_it_was_somebody(caplog):
    caplog.set_level(logging.INFO, "serving.audit")
    async with running(num_engines=0) as system:
        assert (await system.client.post("/headway/reload", json=None)).status_code == 200
    assert "somebody, as no keys are set, at 127.0.0.1 reloaded" in caplog.text
