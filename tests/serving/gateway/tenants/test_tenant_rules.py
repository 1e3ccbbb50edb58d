"""Who is let in, to what, and what is said to whoever is not: the tenants without a server."""

import datetime
import hashlib
import hmac
import json
import time

import pytest

from router import Request, RequestClass, Usage
from router.limits.tenant_quota import TenantLimits
from serving.config import TenantConfig, parse
from serving.gateway.http.errors import ApiError
from serving.gateway.tenants.keys import make_key
from serving.gateway.tenants.tenants import (
    Consumption,
    Tenant,
    Tenants,
    TenantsState,
    TenantState,
    _duration,
)
from tests.support.builders import req


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the tenants' clock shows; set `clock.now_s`."""

    class Clock:
        now_s = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now_s)
    return Clock


class Office:
    """Tenants `acme` and `ops`, one key each; `ops` is an admin."""

    def __init__(self, configs: dict | None = None, num_gateways: int = 1, **auth) -> None:
        made = {name: make_key(name, admin=name == "ops") for name in ("acme", "ops")}
        self.texts = {name: text for name, (text, _) in made.items()}
        self.keys = [key for _, key in made.values()]
        gateway = {"replicas": num_gateways}
        config = parse({"tenants": configs or {}, "auth": auth, "gateway": gateway})
        self.tenants = Tenants(config, self.keys)

    def headers(self, name: str) -> list[tuple[bytes, bytes]]:
        return [(b"host", b"x"), (b"authorization", f"Bearer {self.texts[name]}".encode())]

    def tenant(self, name: str):
        return self.tenants.authenticate(self.headers(name)).tenant


def asked(num_prompt_tokens: int = 10, max_output_tokens: int | None = 5) -> Request:
    return req("a", num_prompt_tokens, max_output_tokens=max_output_tokens)


def told(error: ApiError) -> tuple:
    """What a client sees of an error."""
    fields = json.loads(error.body())["error"]
    return error.status, fields["message"], fields["type"], fields["param"], fields["code"]


class TestKeys:
    def test_tell_who_it_is(self):
        office = Office()
        for name, is_admin in (("acme", False), ("ops", True)):
            caller = office.tenants.authenticate(office.headers(name))
            assert (caller.tenant.name, caller.is_admin) == (name, is_admin)
        assert office.tenant("acme") is office.tenant("acme")

    @pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
    def test_are_borne_in_any_case(self, scheme):
        office = Office()
        value = f"{scheme} {office.texts['acme']} ".encode()
        assert office.tenants.authenticate([(b"authorization", value)]) is not None

    @pytest.mark.parametrize("value", [None, b"", b"Basic x", b"Bearerx y", b"hw-x"])
    def test_that_are_missing_are_asked_for(self, value):
        headers = [] if value is None else [(b"authorization", value)]
        with pytest.raises(ApiError) as error:
            Office().tenants.authenticate(headers)
        assert told(error.value) == (
            401,
            "You didn't provide an API key: Authorization: Bearer YOUR_KEY",
            "invalid_request_error",
            None,
            "invalid_api_key",
        )

    @pytest.mark.parametrize("value", [b"Bearer", b"Bearer x", b"Bearer \xff"])
    def test_that_are_wrong_are_called_so(self, value):
        with pytest.raises(ApiError) as error:
            Office().tenants.authenticate([(b"authorization", value)])
        assert told(error.value) == (
            401,
            "Incorrect API key provided.",
            "invalid_request_error",
            None,
            "invalid_api_key",
        )

    def test_of_the_first_header_count(self):
        office = Office()
        headers = [*office.headers("acme"), (b"authorization", b"Bearer x")]
        assert office.tenants.authenticate(headers).tenant.name == "acme"

    def test_are_those_of_today(self):
        office = Office()
        office.tenants.use_keys(office.keys[1:])
        assert office.tenants.authenticate(office.headers("ops"))
        with pytest.raises(ApiError, match="Incorrect"):
            office.tenants.authenticate(office.headers("acme"))
        text, key = make_key("acme", expires=datetime.datetime.now(datetime.UTC))
        office.tenants.use_keys([key])
        with pytest.raises(ApiError, match="Incorrect"):
            office.tenants.authenticate([(b"authorization", f"Bearer {text}".encode())])

    def test_are_needed_by_nobody_where_there_are_none(self):
        tenants = Tenants(parse({}), None)
        assert tenants.authenticate([]) is None
        assert tenants.usable_models([], ["a"]) == ["a"]
        tenants.authorize_admin([])
        assert tenants.state(0.0) == TenantsState(num_keys=None, by_name={})


class TestMayUse:
    def test_what_is_listed(self):
        office = Office({"acme": {"models": ["a", "b"]}})
        acme, ops = office.tenant("acme"), office.tenant("ops")
        assert acme.may_use(["x", "b"])
        assert not acme.may_use(["x"])
        assert not acme.may_use([])
        assert ops.may_use(["x"])
        assert office.tenants.usable_models(office.headers("acme"), "bxa") == ["b", "a"]
        assert office.tenants.usable_models(office.headers("ops"), "bxa") == ["b", "x", "a"]
        assert office.tenants.usable_models([], "bxa") is None

    def test_the_servers_own_pages_as_an_admin(self):
        office = Office()
        office.tenants.authorize_admin(office.headers("ops"))
        with pytest.raises(ApiError) as error:
            office.tenants.authorize_admin(office.headers("acme"))
        assert told(error.value) == (
            403,
            "This needs an admin key (`headway key create TENANT --admin`).",
            "PermissionDeniedError",
            None,
            403,
        )
        with pytest.raises(ApiError, match="didn't provide"):
            office.tenants.authorize_admin([])

    def test_classes_that_are_listed(self):
        acme = Office({"acme": {"classes": ["standard", "batch"]}}).tenant("acme")
        acme.check_class(RequestClass.BATCH)
        with pytest.raises(ApiError) as error:
            acme.check_class(RequestClass.INTERACTIVE)
        assert told(error.value) == (
            403,
            "Your key is not allowed class interactive; it is allowed standard, batch",
            "PermissionDeniedError",
            "x-headway-class",
            403,
        )
        Office().tenant("acme").check_class(RequestClass.INTERACTIVE)

    @pytest.mark.parametrize(
        ("config", "default"),
        [
            ({}, "standard"),
            ({"classes": ["batch", "standard"]}, "standard"),
            ({"classes": ["batch", "interactive"]}, "batch"),
            ({"classes": ["batch", "standard"], "default_class": "batch"}, "batch"),
        ],
    )
    def test_a_class_that_nobody_named(self, config, default):
        acme = Office({"acme": config}).tenant("acme")
        assert acme.default_class(RequestClass.STANDARD).value == default


class TestPrefixes:
    def test_are_each_tenants_own(self):
        office = Office()
        acme, ops = office.tenant("acme"), office.tenant("ops")
        salts = {each.cache_salt(own) for each in (acme, ops) for own in ("", "mine", "é")}
        assert len(salts) == 6
        key = hashlib.sha256(b"acme").digest()
        expected = hashlib.blake2b("é".encode(), key=key, digest_size=16).hexdigest()
        assert hmac.compare_digest(acme.cache_salt("é"), expected)

    def test_are_so_unless_the_opposite_is_said(self):
        assert Tenant("acme", TenantConfig(), TenantLimits(), 0.0).cache_salt("")

    def test_are_everybodys_where_that_is_wanted(self):
        assert Office(share_prefix_cache=True).tenant("acme").cache_salt("mine") is None


@pytest.mark.usefixtures("clock")
class TestLimits:
    def test_are_told_with_what_is_left(self, clock):
        office = Office({"acme": {"requests_per_min": 60, "tokens_per_min": 120}})
        admitted = office.tenants.admit_request(office.tenant("acme"), asked(70, 20))
        assert admitted.headers == [
            (b"x-ratelimit-limit-requests", b"60"),
            (b"x-ratelimit-remaining-requests", b"59"),
            (b"x-ratelimit-reset-requests", b"1s"),
            (b"x-ratelimit-limit-tokens", b"120"),
            (b"x-ratelimit-remaining-tokens", b"30"),
            (b"x-ratelimit-reset-tokens", b"45s"),
        ]
        assert Office().tenants.admit_request(office.tenant("ops"), asked()).headers == []

    def test_refuse_what_is_over_them(self, clock):
        office = Office({"acme": {"tokens_per_min": 120}})
        acme = office.tenant("acme")
        office.tenants.admit_request(acme, asked(70, 20))
        with pytest.raises(ApiError) as error:
            office.tenants.admit_request(acme, asked(30, 10))
        assert told(error.value) == (
            429,
            "You exceeded tokens_per_min of acme (120).",
            "tokens",
            None,
            "rate_limit_exceeded",
        )
        assert error.value.headers()[1:] == [
            (b"x-ratelimit-limit-tokens", b"120"),
            (b"x-ratelimit-remaining-tokens", b"30"),
            (b"x-ratelimit-reset-tokens", b"45s"),
            (b"retry-after", b"5"),
        ]
        clock.now_s += 5.0
        office.tenants.admit_request(acme, asked(30, 10))

    def test_say_which_it_is(self, clock):
        office = Office({"acme": {"requests_per_min": 1}, "ops": {"max_concurrent_requests": 1}})
        for name, words, kind in (
            ("acme", "requests_per_min of acme (1)", "requests"),
            ("ops", "max_concurrent_requests of ops (1)", "tokens"),
        ):
            tenant = office.tenant(name)
            office.tenants.admit_request(tenant, asked())
            with pytest.raises(ApiError) as error:
                office.tenants.admit_request(tenant, asked())
            assert told(error.value)[1:3] == (f"You exceeded {words}.", kind)

    def test_say_where_waiting_is_no_use(self, clock):
        office = Office({"acme": {"tokens_per_min": 120}})
        with pytest.raises(ApiError) as error:
            office.tenants.admit_request(office.tenant("acme"), asked(121))
        assert str(error.value) == (
            "You exceeded tokens_per_min of acme (120). "
            "This request has about 121 prompt tokens: it can never pass."
        )
        assert error.value.retry_after_s is None

    @pytest.mark.parametrize(
        ("num_gateways", "limits"),
        [(1, (6.0, 900.0, 5)), (2, (3.0, 450.0, 2)), (9, (1.0, 100.0, 1))],
    )
    def test_are_shared_out_among_gateways(self, num_gateways, limits):
        config = {"requests_per_min": 6, "tokens_per_min": 900, "max_concurrent_requests": 5}
        office = Office({"acme": config}, num_gateways)
        mine = office.tenant("acme").quota.limits
        found = mine.requests_per_min, mine.tokens_per_min, mine.max_concurrent_requests
        assert found == limits
        none = office.tenant("ops").quota.limits
        found = none.requests_per_min, none.tokens_per_min, none.max_concurrent_requests
        assert found == (None, None, None)

    def test_change_for_those_who_are_here(self, clock):
        office = Office({"acme": {"tokens_per_min": 120}, "ops": {"weight": 3.0}})
        acme, ops = office.tenant("acme"), office.tenant("ops")
        office.tenants.admit_request(acme, asked(70, 20))
        clock.now_s += 30.0
        configs = parse({"tenants": {"acme": {"tokens_per_min": 200, "weight": 2.0}}}).tenants
        office.tenants.use_configs(configs)
        assert acme.config is configs["acme"]
        assert acme.quota.remaining(clock.now_s)["tokens"][:2] == (200, 170.0)
        assert ops.config.weight == 1.0
        text, key = make_key("new")
        office.tenants.use_keys([key])
        assert office.tenants.state(clock.now_s).num_keys == 1
        office.tenants.use_configs({"new": configs["acme"]})  # of whom nobody has heard yet
        new = office.tenants.authenticate([(b"authorization", f"Bearer {text}".encode())])
        assert new.tenant.config.weight == 2.0


@pytest.mark.usefixtures("clock")
class TestUse:
    USAGE = Usage(num_prompt_tokens=60, num_cached_tokens=16, num_output_tokens=7)

    def test_is_counted_by_tenant(self, clock):
        office = Office({"acme": {"tokens_per_min": 120, "max_concurrent_requests": 2}})
        office.tenant("ops")
        acme = office.tenant("acme")
        for usage in (self.USAGE, None):
            admitted = office.tenants.admit_request(acme, asked(60, 0))
            assert acme.quota.num_concurrent == 1
            office.tenants.end_request(admitted, usage)
            clock.now_s += 60.0
        admitted = office.tenants.admit_request(acme, asked(60, 0))
        for _ in range(2):
            with pytest.raises(ApiError):
                office.tenants.admit_request(acme, asked(100, 0))
        office.tenants.end_request(admitted, self.USAGE)
        used = Consumption(
            num_requests=3,
            num_refused=2,
            num_prompt_tokens=120,
            num_cached_tokens=32,
            num_output_tokens=14,
        )
        usage = office.tenants.usage()
        assert usage == {"acme": used, "ops": Consumption()}
        assert list(usage) == ["acme", "ops"]
        usage["acme"].num_requests = 99  # a copy
        state = office.tenants.state(clock.now_s)
        assert state.num_keys == 2
        assert list(state.by_name) == ["acme", "ops"]
        assert state.by_name["acme"] == TenantState(
            num_requests=3,
            num_refused=2,
            num_prompt_tokens=120,
            num_cached_tokens=32,
            num_output_tokens=14,
            num_concurrent=0,
            weight=1.0,
            remaining={"tokens": 53.0},
        )
        assert state.by_name["ops"].remaining == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, b"0ms"),
        (0.02, b"20ms"),
        (0.0201, b"21ms"),
        (0.999, b"999ms"),
        (1.0, b"1s"),
        (1.5, b"1.5s"),
        (59.999, b"59.999s"),
        (60.0, b"1m0s"),
        (361.5, b"6m1.5s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert _duration(seconds) == text
