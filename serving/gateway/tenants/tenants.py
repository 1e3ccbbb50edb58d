"""Who asks, what may they ask for, how much of it is left, and what have they used?"""

import datetime
import hashlib
import math
import time
from collections.abc import Iterable, Mapping

import msgspec

from router import Request, RequestClass, Usage
from router.limits.tenant_quota import Exceeded, Reservation, TenantLimits, TenantQuota
from serving.config import Config, TenantConfig
from serving.gateway.http.errors import ApiError
from serving.gateway.tenants.keys import Key, KeyRing
from serving.stream.frames import Headers

_UNLISTED = TenantConfig()


class Consumption(msgspec.Struct):
    """What a tenant has used since the gateway started."""

    num_requests: int = 0  # admitted; those from the response cache included
    num_refused: int = 0  # over a limit
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of those, found in an engine's prefix cache
    num_output_tokens: int = 0


class TenantState(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant has used (as in `Consumption`), and what it may still use."""

    num_requests: int
    num_refused: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_concurrent: int
    weight: float
    remaining: dict[str, float]  # `requests` and `tokens`, as far as there is a limit


class TenantsState(msgspec.Struct, frozen=True, kw_only=True):
    """All tenants that have been here; no key, and no hash of one."""

    num_keys: int | None  # None: nobody needs one
    by_name: dict[str, TenantState]


class Tenant:
    """One tenant, for as long as the gateway lives."""

    def __init__(
        self,
        name: str,
        config: TenantConfig,
        limits: TenantLimits,
        now_s: float,
        *,
        shares_prefixes: bool = False,
    ) -> None:
        """With `shares_prefixes` an engine's prefix cache serves it and others alike."""
        self.name = name
        self.config = config
        self._shares_prefixes = shares_prefixes
        self._salt_key = hashlib.sha256(name.encode()).digest()
        self.quota = TenantQuota(limits, now_s)
        self.consumption = Consumption()

    def default_class(self, general: RequestClass) -> RequestClass:
        """Class of a request that names none; `general` is the gateway's default."""
        if self.config.default_class is not None:
            return self.config.default_class
        classes = self.config.classes
        return general if classes is None or general in classes else classes[0]

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether a model of any of these names is allowed."""
        return self.config.models is None or not self.config.models.isdisjoint(names)

    def cache_salt(self, own_salt: str) -> str | None:
        """Return the salt of the prefixes that engines may find again for this tenant.

        None where prefixes are shared. `own_salt` is the request's; then only requests with the
        same one share. A digest, because vLLM takes few characters, and only some.
        """
        if self._shares_prefixes:
            return None
        salt = hashlib.blake2b(own_salt.encode(), key=self._salt_key, digest_size=16)
        return salt.hexdigest()

    def check_class(self, request_class: RequestClass) -> None:
        """Raise `ApiError` for a class that is not allowed."""
        classes = self.config.classes
        if classes is not None and request_class not in classes:
            raise ApiError(
                403,
                f"Your key is not allowed class {request_class.value}; it is allowed "
                + ", ".join(allowed.value for allowed in classes),
                kind="PermissionDeniedError",
                param="x-headway-class",
            )


class Caller(msgspec.Struct, frozen=True):
    """The holder of a valid key."""

    tenant: Tenant
    is_admin: bool


class AdmittedRequest(msgspec.Struct, frozen=True):
    """One request of a tenant, from its admission to its end."""

    tenant: Tenant
    reservation: Reservation
    headers: Headers  # what is left, by OpenAI's names


class Tenants:
    """All tenants of one gateway; with several gateways each holds to its part of the limits."""

    def __init__(self, config: Config, keys: Iterable[Key] | None) -> None:
        """With `keys` None no request needs one."""
        self._num_gateways = config.gateway.num_replicas
        self._shares_prefixes = config.auth.share_prefix_cache
        self._configs: Mapping[str, TenantConfig] = config.tenants
        self._tenants: dict[str, Tenant] = {}
        self._keys: KeyRing | None = None
        if keys is not None:
            self.use_keys(keys)

    def use_keys(self, keys: Iterable[Key]) -> None:
        """Accept these keys from now on, and no others. Running requests go on."""
        self._keys = KeyRing(keys)

    def use_configs(self, configs: Mapping[str, TenantConfig]) -> None:
        """Hold to these limits from now on; what is used stays used."""
        self._configs = configs
        now_s = time.monotonic()
        for tenant in self._tenants.values():
            tenant.config = configs.get(tenant.name, _UNLISTED)
            tenant.quota.use_limits(self._limits(tenant.config), now_s)

    def authenticate(self, headers: Headers) -> Caller | None:
        """Return who sends these headers; None where no key is needed. Raises `ApiError` 401."""
        if self._keys is None:
            return None
        text = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, credentials = text.partition(b" ")
        if not text:  # as Anthropic's clients send it
            credentials = next((value for name, value in headers if name == b"x-api-key"), b"")
        if (scheme.lower() != b"bearer") if text else not credentials:
            raise _unauthorized("You didn't provide an API key: Authorization: Bearer YOUR_KEY")
        now = datetime.datetime.now(datetime.UTC)
        key = self._keys.find(credentials.strip().decode("latin-1"), now)
        if key is None:
            raise _unauthorized("Incorrect API key provided.")
        return Caller(self._tenant(key.tenant), key.admin)

    def acting_for(self, name: str) -> Caller | None:
        """Return who asks for what a tenant has left here to do; None where nobody needs a key.

        Raise `ApiError` 401 if the tenant has no key any more.
        """
        if self._keys is None:
            return None
        if not self._keys.has_tenant(name, datetime.datetime.now(datetime.UTC)):
            raise _unauthorized("The tenant has no key that is valid.")
        return Caller(self._tenant(name), is_admin=False)

    def usable_models(self, headers: Headers, names: Iterable[str]) -> list[str] | None:
        """Return which of these models are for who sends these headers.

        None if the service is not for them at all.
        """
        try:
            caller = self.authenticate(headers)
        except ApiError:
            return None
        return [name for name in names if caller is None or caller.tenant.may_use((name,))]

    def authorize_admin(self, headers: Headers) -> None:
        """Raise `ApiError` 401 or 403 unless an admin sends these headers."""
        caller = self.authenticate(headers)
        if caller is not None and not caller.is_admin:
            raise ApiError(
                403,
                "This needs an admin key (`headway key create TENANT --admin`).",
                kind="PermissionDeniedError",
            )

    def admit_request(self, tenant: Tenant, request: Request) -> AdmittedRequest:
        """Reserve for a request, until `end_request`. Raises `ApiError` 429 if over a limit."""
        now_s = time.monotonic()
        reservation = tenant.quota.reserve(
            request.num_prompt_tokens, request.max_output_tokens, request.num_sequences, now_s
        )
        if isinstance(reservation, Exceeded):
            tenant.consumption.num_refused += 1
            raise _too_many(tenant, request, reservation, now_s)
        tenant.consumption.num_requests += 1
        return AdmittedRequest(tenant, reservation, _rate_limit_headers(tenant.quota, now_s))

    def end_request(self, admitted: AdmittedRequest, usage: Usage | None) -> None:
        """End a request's reservation and count what it took; None if that is not known."""
        tenant = admitted.tenant
        tenant.quota.end_reservation(admitted.reservation, usage, time.monotonic())
        if usage is not None:
            consumption = tenant.consumption
            consumption.num_prompt_tokens += usage.num_prompt_tokens
            consumption.num_cached_tokens += usage.num_cached_tokens
            consumption.num_output_tokens += usage.num_output_tokens

    def usage(self) -> dict[str, Consumption]:
        """Return what each tenant has used until now, by name."""
        return {
            name: msgspec.structs.replace(tenant.consumption)
            for name, tenant in sorted(self._tenants.items())
        }

    def state(self, now_s: float) -> TenantsState:
        """Return how many keys there are, and every tenant's use and what is left of it."""
        return TenantsState(
            num_keys=len(self._keys) if self._keys is not None else None,
            by_name={
                name: TenantState(
                    **msgspec.structs.asdict(tenant.consumption),
                    num_concurrent=tenant.quota.num_concurrent,
                    weight=tenant.config.weight,
                    remaining={
                        what: remaining
                        for what, (_, remaining, _) in tenant.quota.remaining(now_s).items()
                    },
                )
                for name, tenant in sorted(self._tenants.items())
            },
        )

    def _tenant(self, name: str) -> Tenant:
        """Return the tenant of this name, made when it is first seen."""
        tenant = self._tenants.get(name)
        if tenant is None:
            config = self._configs.get(name, _UNLISTED)
            tenant = Tenant(
                name,
                config,
                self._limits(config),
                time.monotonic(),
                shares_prefixes=self._shares_prefixes,
            )
            self._tenants[name] = tenant
        return tenant

    def _limits(self, config: TenantConfig) -> TenantLimits:
        """This gateway's part of a tenant's limits."""
        count = self._num_gateways
        requests, concurrent = config.requests_per_min, config.max_concurrent_requests
        return TenantLimits(
            # At least one: a part of a request can never go.
            requests_per_min=requests and max(1.0, requests / count),
            tokens_per_min=config.tokens_per_min and config.tokens_per_min / count,
            max_concurrent_requests=concurrent and max(1, concurrent // count),
        )


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, kind="invalid_request_error", code="invalid_api_key")


def _too_many(tenant: Tenant, request: Request, exceeded: Exceeded, now_s: float) -> ApiError:
    limit = getattr(tenant.config, exceeded.limit)
    message = f"You exceeded {exceeded.limit} of {tenant.name} ({limit:g})."
    never = math.isinf(exceeded.wait_s)
    if never:
        message += (
            f" This request has about {request.num_prompt_tokens} prompt tokens: it can never pass."
        )
    return ApiError(
        429,
        message,
        kind="requests" if exceeded.limit == "requests_per_min" else "tokens",
        code="rate_limit_exceeded",
        retry_after_s=None if never else exceeded.wait_s,
        headers=_rate_limit_headers(tenant.quota, now_s),
    )


def _rate_limit_headers(quota: TenantQuota, now_s: float) -> Headers:
    """OpenAI's headers for the limits in force."""
    headers: Headers = []
    for what, (limit, remaining, reset_s) in quota.remaining(now_s).items():
        name = what.encode()
        headers += [
            (b"x-ratelimit-limit-" + name, b"%d" % limit),
            (b"x-ratelimit-remaining-" + name, b"%d" % remaining),
            (b"x-ratelimit-reset-" + name, _duration(reset_s)),
        ]
    return headers


def _duration(seconds: float) -> bytes:
    """Return a duration as OpenAI writes it, and Go: `6m0s`, `1.5s`, `20ms`."""
    num_ms = math.ceil(seconds * 1000)
    if num_ms < 1000:
        return b"%dms" % num_ms
    minutes, num_ms = divmod(num_ms, 60_000)
    text = f"{num_ms / 1000:g}s"
    return (f"{minutes}m{text}" if minutes else text).encode()
