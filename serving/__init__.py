"""The shells around the core: Ray Serve, vLLM, HTTP, the command line.

Nothing is decided here about routing: processes and connections are started, watched and ended,
bytes are moved, and the router is told and obeyed. One folder per process or job.
"""

from serving.core_form import use_core

use_core()
