"""What does a worker of vLLM's have of LoRA adapters, and how long did it take to load each?"""

import time
from typing import Any

Held = tuple[list[int], list[int], list[tuple[int, float]], float]


class AdapterWorker:
    """Mixed into vLLM's workers by `worker_extension_cls`; methods are called by their names.

    Adapters by vLLM's numbers for them.
    """

    model_runner: Any

    def watch_adapters(self) -> None:
        """Measure from now on how long adapters take."""
        manager = self.model_runner.lora_manager
        self._adapter_load_s: dict[int, float] = {}
        self._adapter_swap_s = 0.0
        add = manager.add_adapter

        def add_adapter(request: Any) -> Any:
            number = request.adapter_id
            was_cached = number in manager.list_adapters() and not request.load_inplace
            if was_cached and number in manager._adapter_manager.lora_index_to_id:
                return add(request)  # the usual case: it is only touched
            began_s = time.monotonic()
            added = add(request)
            took_s = time.monotonic() - began_s
            if was_cached:
                self._adapter_swap_s = took_s
            else:
                self._adapter_load_s[number] = took_s
            return added

        manager.add_adapter = add_adapter

    def held_adapters(self) -> Held:
        """Return which are resident and which are cached beside; what loading took, by adapter.

        And what making a cached one resident took last; 0: that never happened.
        """
        manager = self.model_runner.lora_manager
        resident = [each for each in manager._adapter_manager.lora_index_to_id if each is not None]
        cached = [each for each in manager.list_adapters() if each not in resident]
        return resident, cached, list(self._adapter_load_s.items()), self._adapter_swap_s
