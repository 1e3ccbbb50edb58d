"""How long will an answer be: how good is what is said, and what was it learned from?

Trained by `make train-predictor`, judged by `make eval-predictor`; docs/predictor.md.
"""
