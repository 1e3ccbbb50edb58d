"""What is learned online: step times, prefill rates, output lengths, departure rates.

Nothing is decided here: each estimator makes one prediction of what it observes, in seconds or
tokens. Fed and read by `router.fleet`, `router.scheduling` and whoever reserves output tokens.
"""
