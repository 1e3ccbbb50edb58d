"""What is learned online: step times, prefill rates, output lengths, waits.

Nothing is decided here: each estimator turns observations into one prediction, in seconds or
tokens, and says how far off it has been. Fed and asked by `router.fleet` and the router.
"""
