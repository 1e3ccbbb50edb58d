"""Which LoRA adapters does a vLLM engine serve, which has it at hand, and what does loading take?

vLLM's API layer keeps which names it serves, its workers which of them they have loaded: the
`max_loras` that a step can use and `max_cpu_loras` in all, the others to be loaded anew when a
request comes. Workers are asked after each step that used one which was not resident; all else
follows from what they said last.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.types import AdapterState

logger = logging.getLogger(__name__)

WORKER = "serving.engine.vllm.adapters.worker.AdapterWorker"
REGISTER = "/headway/adapters"  # of an engine; no client can reach it
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


class AdapterWatch:
    """The adapters of one engine. Everything runs on the event loop of its replica."""

    def __init__(self, llm: Any, lora_config: Any) -> None:
        self.paths: dict[str, str] = {}  # of those that are served, by name; replaced, not changed
        self.max_loras: int = lora_config.max_loras
        self._llm = llm
        self._lora_config = lora_config
        self._models: Any = None
        self._names: dict[int, str] = {}  # by vLLM's numbers
        self._held = AdapterState()
        self._on_change: Callable[[], None] = lambda: None
        self._asking: asyncio.Task[None] | None = None
        self._is_stale = False  # something was loaded since the workers were asked last
        self._was_loaded = False  # between two steps

    @classmethod
    async def start(cls, llm: Any, lora_config: Any) -> "AdapterWatch":
        """Begin to measure, before the first adapter is loaded."""
        await llm.collective_rpc("watch_adapters")
        return cls(llm, lora_config)

    async def attach(self, app: Any, on_change: Callable[[], None]) -> None:
        """Follow which adapters vLLM's API layer serves; have `on_change()` called when that, or
        what is at hand, has changed.
        """
        self._models, self._on_change = app.state.openai_serving_models, on_change
        self._models.lora_requests = _Served(self._models.lora_requests, self._on_served)
        app.router.routes.append(Route(REGISTER, self.register, methods=["POST"]))
        self._on_served()
        if self._asking is not None:
            await self._asking

    # --- what is at hand -----------------------------------------------------------

    def on_step(self, used: Iterable[str]) -> bool:
        """Take note of the adapters that a step used; return whether it, or its gap, loaded any."""
        was_loaded, self._was_loaded = self._was_loaded, False
        if any(name in self.paths and name not in self._held.resident for name in used):
            self._ask_workers()
            return True
        return was_loaded

    def state(self, num_requests: dict[str, int]) -> AdapterState:
        """Return what is at hand, and how many requests the engine has for each adapter."""
        held = self._held
        return AdapterState(
            resident=held.resident,
            cached=held.cached,
            num_requests=num_requests,
            load_s=held.load_s,
            swap_s=held.swap_s,
        )

    def _on_served(self) -> None:
        requests = self._models.lora_requests
        self.paths = {name: lora.lora_path for name, lora in requests.items()}
        self._names = {lora.lora_int_id: name for name, lora in requests.items()}
        self._was_loaded = True
        self._ask_workers()
        self._on_change()

    def _ask_workers(self) -> None:
        self._is_stale = True
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_until_fresh())

    async def _ask_until_fresh(self) -> None:
        while self._is_stale:
            self._is_stale = False
            try:
                answers = await self._llm.collective_rpc("held_adapters")
            except Exception as error:  # the core ends, and the engine with it
                logger.warning("the workers do not tell which adapters they have: %s", error)
                return
            resident, cached, _, _ = answers[0]  # all workers load the same
            load_s: dict[str, float] = {}
            for _, _, loads, _ in answers:
                for number, took_s in loads:
                    if (name := self._names.get(number)) is not None:
                        load_s[name] = max(took_s, load_s.get(name, 0.0))
            self._held = AdapterState(
                resident=self._named(resident),
                cached=self._named(cached),
                load_s=load_s,
                swap_s=max(swap_s for _, _, _, swap_s in answers),
            )
            self._on_change()

    def _named(self, numbers: list[int]) -> list[str]:
        """Return the names of adapters that are served; others wait to be overwritten."""
        return [self._names[each] for each in numbers if each in self._names]

    # --- what is served ------------------------------------------------------------

    async def register(self, request: Request) -> Response:
        """Serve an adapter without loading it, after a look at its files: `{lora_name, lora_path}`.

        Another engine of the same model has loaded it already, so its tensors fit. Here the first
        request for it does; until then it takes no other's place.
        """
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
        from vllm.lora.request import LoRARequest

        models = self._models
        try:
            asked = LoadLoRAAdapterRequest.model_validate_json(await request.body())
            async with models.lora_resolver_lock[asked.lora_name]:
                if self.paths.get(asked.lora_name) == asked.lora_path and asked.load_inplace:
                    return _served(asked.lora_name)  # another gateway has told it
                if (error := await models._check_load_lora_adapter_request(asked)) is not None:
                    return JSONResponse(error.model_dump(), error.error.code)
                await asyncio.to_thread(self._check_files, asked.lora_path)
                models.lora_requests[asked.lora_name] = LoRARequest(
                    asked.lora_name,
                    models.lora_id_counter.inc(1),
                    asked.lora_path,
                    is_3d_lora_weight=asked.is_3d_lora_weight,
                )
        except (ValueError, TypeError, OSError) as error:
            said = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": said}, 400)
        return _served(asked.lora_name)

    def _check_files(self, path: str) -> None:
        """Raise what is wrong with an adapter's files, as far as can be seen without loading."""
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.utils import get_adapter_absolute_path

        folder = get_adapter_absolute_path(path)
        PEFTHelper.from_local_dir(folder, None).validate_legal(self._lora_config)
        if not _has_weights(Path(folder)):
            raise FileNotFoundError(f"there is none of {', '.join(_WEIGHTS)} in {folder}")

    def check_request(self, lora: Any) -> None:
        """Raise `ValueError` if a request's adapter would have to be loaded, and is gone.

        In the middle of a step that would end the engine core, and then the next one's.
        """
        if lora.lora_name in self._held.resident or lora.lora_name in self._held.cached:
            return
        folder = Path(lora.lora_path).expanduser()
        if folder.is_absolute() and not (
            (folder / "adapter_config.json").exists() and _has_weights(folder)
        ):
            raise ValueError(
                f"The files of the LoRA adapter '{lora.lora_name}' are not in {folder} any more."
            )


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in _WEIGHTS)


def _served(name: str) -> Response:
    return Response(f"LoRA adapter '{name}' is served, and loaded when it is needed.")


class _Served(dict[str, Any]):
    """vLLM's adapters by name, which tells when another one is served, or one is not any more."""

    def __init__(self, served: dict[str, Any], on_change: Callable[[], None]) -> None:
        super().__init__(served)
        self._on_change = on_change

    def __setitem__(self, name: str, lora: Any) -> None:
        # It has been loaded by now. Kept (vLLM 0.32), it would be read from its files in each step
        # that uses it, and the engine's core would end when they are gone.
        lora.load_inplace = False
        super().__setitem__(name, lora)
        self._on_change()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._on_change()
