"""What becomes of replies while engines die, hang and return?

`emulated` fails eight emulated engines, `real` kills and hangs two vLLM engines; every reply is
compared with an undisturbed one. Called by `make chaos`; writes `results/chaos-*.json`.
"""
