"""What becomes of more requests than the engines carry?

Measured on the deployed gateway with emulated engines; `plot_overload` in `report` draws it.
Called by `make bench-overload`; writes `results/overload.*`.
"""
