"""How many tokens will an answer have? As a distribution, before it has begun.

Asked by `router.scheduling.predictions` for every request; docs/predictor.md.
"""
