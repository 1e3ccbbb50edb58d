"""Who may still send how much: rates, windows, quotas, and leases of them.

What is decided here: whether so many requests and tokens are within a limit now, and if not,
when they would be. Asked for tenants by the gateway, for providers by `router.providers`.
"""
