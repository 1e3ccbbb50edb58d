"""How long is a prompt, and how is it worded, as far as that tells how long its answer will be?

What `router.estimators.lengths` goes by: numbers for words, so that no text reaches the router, and
the weights that come with the package. docs/predictor.md.
"""
