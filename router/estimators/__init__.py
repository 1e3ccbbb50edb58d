"""What is learned online: step times, prefill rates, output lengths, waits.

Nothing is decided here: each estimator turns observations into one prediction, in seconds or
tokens. Fed and read by `router.fleet`, `router.scheduling` and whoever reserves output tokens.
"""
