"""A tenant by itself."""

from router.limits.tenant_quota import TenantLimits
from serving.config import TenantConfig
from serving.gateway.tenants.tenants import Tenant


def make_tenant(
    name: str = "acme", config: TenantConfig | None = None, *, shares_prefixes: bool = False
) -> Tenant:
    """Without limits."""
    return Tenant(
        name, config or TenantConfig(), TenantLimits(), 0.0, shares_prefixes=shares_prefixes
    )
