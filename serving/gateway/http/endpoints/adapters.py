"""How does a LoRA adapter get to all engines of its model, and off them, while they serve?

One engine loads it, which shows that it fits. The others only look at its files: they load it when
a request for it comes, so one that nobody uses takes no place anywhere else. Which adapters there
are to be is an order that all gateways know (`OrderBook`), and an engine that joins later is told
what it lacks by each of them; the second to tell it is answered that it has it already.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from serving.engine.vllm.adapters.watch import REGISTER
from serving.gateway.engines import Engines
from serving.gateway.http.endpoints.questions import NotAnswered
from serving.gateway.http.errors import ApiError, model_not_found
from serving.gateway.observe.peers.together import Together
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)
audit = logging.getLogger("serving.audit")  # what admins change

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS = (LOAD, UNLOAD, "/adapters", "/adapters/{adapter_name}")
_HEADERS: Headers = [(b"content-type", b"application/json")]
_TIMEOUT_S = 600.0  # to fetch and load weights
_TOLD_S = 2.0  # for an engine's next snapshot to tell what it has been told
_LOOK_S = 0.005

Result = dict[str, Any]  # status and answer of one engine


class _Adapter(msgspec.Struct):
    """What an admin says of an adapter: vLLM's fields, and its other names for them."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    name: str = ""  # of `/adapters`
    src: str = ""
    model: str = ""  # ours: which model's engines, where there are several


class LoraAdapters:
    """Has engines load adapters and unload them."""

    def __init__(self, engines: Engines, together: Together) -> None:
        self._engines = engines
        self._together = together
        self._joining: set[asyncio.Task[None]] = set()
        engines.on_join = self.on_join

    async def change(
        self, path: str, body: bytes, adapter_name: str | None
    ) -> dict[str, Result] | None:
        """Do what an admin asks for at one of `PATHS`. Return each engine's result.

        None if it is not clear what is asked: then engines say best what is wrong. Raise `ApiError`
        where several models may be meant, or the name is another's.
        """
        try:
            asked = _Adapter(name=adapter_name) if adapter_name else _decode(body)
        except (msgspec.MsgspecError, RecursionError):
            return None
        asked.lora_name = asked.lora_name or asked.name
        asked.lora_path = asked.lora_path or asked.src
        if adapter_name or path == UNLOAD:
            return await self._unload(asked) if asked.lora_name else None
        return await self._load(asked) if asked.lora_name and asked.lora_path else None

    async def _load(self, asked: _Adapter) -> dict[str, Result]:
        name, infos = asked.lora_name, self._engines.infos
        targets = self._targets(asked.model, LOAD)
        model = infos[targets[0]].model
        self._check_name(name, model)
        told = {
            "lora_name": name,
            "lora_path": asked.lora_path,
            "load_inplace": asked.load_inplace,
            "is_3d_lora_weight": asked.is_3d_lora_weight,
        }
        lacking = [each for each in targets if name not in infos[each].adapters]
        if asked.load_inplace or not lacking:
            results = await self._ask_all(targets, LOAD, told)
        else:
            first, others = lacking[0], lacking[1:]
            results = {first: await self._ask(first, LOAD, told)}
            if results[first]["status"] < 400:
                results |= await self._ask_all(others, REGISTER, told)
        have = [each for each, result in results.items() if result["status"] < 400]
        if have:
            self._together.orders.order_adapter(name, model, told)
            await self._note(f"loaded LoRA adapter {name} of {model} from {asked.lora_path}")
            await self._until_told(name, have, is_served=True)
        return results

    async def _unload(self, asked: _Adapter) -> dict[str, Result]:
        name, infos = asked.lora_name, self._engines.infos
        targets = self._targets(asked.model, UNLOAD, name)
        having = [each for each in targets if name in infos[each].adapters]
        if not having:
            return await self._ask_all(targets, UNLOAD, {"lora_name": name})
        # First: an engine that joins now is not to be told of it by anybody.
        self._together.orders.order_adapter(name, infos[having[0]].model, None)
        await self._note(f"unloaded LoRA adapter {name}")
        results = await self._ask_all(having, UNLOAD, {"lora_name": name})
        gone = [each for each, result in results.items() if result["status"] < 400]
        await self._until_told(name, gone, is_served=False)
        return results

    # --- which engines -------------------------------------------------------------

    def _targets(self, model: str, path: str, name: str = "") -> list[str]:
        """Return the engines of the model that is meant, the one with the least work first.

        Without a name of it: the only one that takes adapters, or that has the one of this name.
        """
        infos = self._engines.infos
        found = self._engines.having(f"POST {path}")
        if model:
            found = [each for each in found if model in (infos[each].model, *infos[each].aliases)]
            if not found:
                raise model_not_found(model)
        elif any(name in infos[each].adapters for each in found):
            found = [each for each in found if name in infos[each].adapters]
        models = sorted({infos[each].model for each in found})
        if len(models) > 1:
            raise ApiError(
                400, f"'model' has to say of which model: {', '.join(models)}", param="model"
            )
        return found

    def _check_name(self, name: str, model: str) -> None:
        """Raise `ApiError` if a model, or an adapter of another model, has this name."""
        for info in self._engines.infos.values():
            is_adapter = name in info.adapters
            if name in (info.model, *info.aliases) and not (is_adapter and info.model == model):
                raise ApiError(
                    400, f"The name '{name}' is taken: '{info.model}' has it.", param="lora_name"
                )

    # --- engines that come later -----------------------------------------------------

    def on_join(self, replica_id: str) -> None:
        """Tell an engine that has connected which adapters it lacks, or has no more."""
        orders = self._together.orders.orders.adapters
        info = self._engines.infos[replica_id]
        told: list[tuple[str, dict[str, Any]]] = []
        for name, order in orders.items():
            if order.model != info.model or (order.load is not None) == (name in info.adapters):
                continue
            if order.load is not None:
                told.append((REGISTER, order.load))
            else:
                told.append((UNLOAD, {"lora_name": name}))
        if told:
            task = asyncio.get_running_loop().create_task(self._tell(replica_id, told))
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)

    async def _tell(self, replica_id: str, told: Sequence[tuple[str, dict[str, Any]]]) -> None:
        for path, body in told:
            result = await self._ask(replica_id, path, body)
            name = body["lora_name"]
            if result["status"] < 400:
                logger.info("engine %s: LoRA adapter %s: %s", replica_id, name, result["answer"])
                continue
            info = self._engines.infos.get(replica_id)
            if info is not None and (name in info.adapters) != (path == REGISTER):
                logger.warning("engine %s: LoRA adapter %s: %s", replica_id, name, result)

    # --- asking --------------------------------------------------------------------

    async def _ask_all(
        self, replica_ids: Sequence[str], path: str, body: dict[str, Any]
    ) -> dict[str, Result]:
        results = await asyncio.gather(*(self._ask(each, path, body) for each in replica_ids))
        return dict(zip(replica_ids, results, strict=True))

    async def _ask(self, replica_id: str, path: str, body: dict[str, Any]) -> Result:
        """Return status and answer of one engine; one that is not ours loads what it is told of."""
        if (info := self._engines.infos.get(replica_id)) is None:
            return {"status": 502, "answer": "the engine was lost"}
        if path == REGISTER and f"POST {REGISTER}" not in info.routes:
            path = LOAD
        content = msgspec.json.encode(body)
        question = self._engines.ask(replica_id, "POST", path, _HEADERS, content)
        try:
            status, answer = await question.whole(_TIMEOUT_S)
        except NotAnswered as error:
            return {"status": 502, "answer": str(error)}
        finally:
            question.close()
        try:
            return {"status": status, "answer": json.loads(answer)}
        except ValueError:
            return {"status": status, "answer": answer.decode(errors="replace")}

    async def _until_told(self, name: str, replica_ids: Sequence[str], *, is_served: bool) -> None:
        """Return when these engines have said themselves what they serve: then requests find it."""
        infos = self._engines.infos

        def is_told(replica_id: str) -> bool:
            info = infos.get(replica_id)
            return info is None or info.is_external or (name in info.adapters) == is_served

        loop = asyncio.get_running_loop()
        until_s = loop.time() + _TOLD_S
        while not all(map(is_told, replica_ids)) and loop.time() < until_s:
            await asyncio.sleep(_LOOK_S)

    async def _note(self, what: str) -> None:
        """Log what an admin has done, here and on the other gateways, which take over the order."""
        audit.info("an admin %s", what)
        await self._together.give_order(f"an admin {what}")


def _decode(body: bytes) -> _Adapter:
    return msgspec.json.decode(body, type=_Adapter)
