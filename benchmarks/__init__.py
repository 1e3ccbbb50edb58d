"""Which question is answered by which benchmark? `README.md` lists command and result of each.

Nothing here is part of the product: `serving` and `router` never import from here. Started by
`make bench-*`, `make chaos` and `python -m benchmarks.…`.
"""

import serving  # noqa: F401  the form of the core that is served is the one that is measured
