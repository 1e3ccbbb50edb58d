"""What is mutated, and which tests have to notice?"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Files that belong together, and the fast tests that concern them."""

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...]


PARTS = (
    Part("resume", ("router/resilience/resume.py",), ("tests/router/resilience/test_resume.py",)),
    Part(
        "retry_budget",
        ("router/resilience/retry_budget.py",),
        ("tests/router/resilience/test_retry_budget.py",),
    ),
    Part(
        "breaker",
        ("router/resilience/breaker.py",),
        (
            "tests/router/resilience/test_breaker_counts.py",
            "tests/router/resilience/test_breaker.py",
            "tests/router/core/test_health.py",
        ),
    ),
    Part(
        "lease",
        ("router/limits/lease.py",),
        (
            "tests/router/limits/test_leased_limiter.py",
            "tests/router/limits/test_lease_server.py",
            "tests/router/limits/test_lease.py",
        ),
    ),
    Part(
        "rate_limit",
        ("router/limits/rate_limit.py",),
        ("tests/router/limits/test_rate_bounds.py", "tests/router/limits/test_rate_limit.py"),
    ),
    Part(
        "sliding_window",
        ("router/limits/sliding_window.py",),
        ("tests/router/limits/test_window_bounds.py", "tests/router/limits/test_sliding_window.py"),
    ),
    Part(
        "tenant_quota",
        ("router/limits/tenant_quota.py",),
        ("tests/router/limits/test_quota_bounds.py", "tests/router/limits/test_tenant_quota.py"),
    ),
    Part(
        "keys",
        ("serving/gateway/tenants/keys.py",),
        (
            "tests/serving/gateway/tenants/test_keys_file.py",
            "tests/serving/gateway/tenants/test_keys.py",
        ),
    ),
    Part(
        "cache_key",
        ("serving/gateway/cache/cache_key.py",),
        ("tests/serving/gateway/cache/test_cache_key.py",),
    ),
    Part(
        "tenants",
        ("serving/gateway/tenants/tenants.py",),
        ("tests/serving/gateway/tenants/test_tenant_rules.py",),
    ),
    Part(
        "guard",
        ("serving/gateway/http/guard.py",),
        (
            "tests/serving/gateway/http/guard/test_limits_of_time.py",
            "tests/serving/gateway/http/guard/test_limits_of_size.py",
        ),
    ),
    Part(
        "driver",
        ("serving/gateway/driver.py",),
        ("tests/serving/gateway/driver",),
    ),
)
