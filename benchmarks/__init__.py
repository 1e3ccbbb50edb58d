"""Questions, commands and results; README.md says which is which.

Nothing here is part of the product: `serving` and `router` never import from here.
"""
