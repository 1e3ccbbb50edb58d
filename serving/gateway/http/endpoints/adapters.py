"""How does a LoRA adapter get to all engines of its model, and off them, while they serve?

One engine loads it, which shows that it fits. The others only look at its files: they load it when
a request for it comes, so one that nobody uses takes no place anywhere else. Which adapters there
are to be is an order that all gateways know (`OrderBook`), and an engine that joins later is told
what it lacks by each of them; the second to tell it is answered that it has it already.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from serving.engine.vllm.adapters.watch import REGISTER
from serving.gateway.engines import Engines
from serving.gateway.http.endpoints.questions import NotAnswered
from serving.gateway.http.errors import ApiError, model_not_found
from serving.gateway.observe.peers.orders import AdapterOrder
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
_LOST = 502  # the status of an engine that has not answered

Result = dict[str, Any]  # status and answer of one engine


class _Adapter(BaseModel):
    """What an admin says of an adapter: vLLM's fields, and those of `/adapters`.

    Read as vLLM reads them (0.32, by pydantic): what is not clear here it refuses, too.
    """

    lora_name: str = Field("", validation_alias=AliasChoices("lora_name", "name"))
    lora_path: str = Field("", validation_alias=AliasChoices("lora_path", "src"))
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    model: str | None = None  # ours: which model's engines, where there are several


class LoraAdapters:
    """Has engines load adapters and unload them."""

    def __init__(
        self, engines: Engines, together: Together, find_owner: Callable[[str], str | None]
    ) -> None:
        """`find_owner` returns what has a name whether an engine of it is up or not; or None."""
        self._engines = engines
        self._together = together
        self._find_owner = find_owner
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
            asked = _Adapter(lora_name=adapter_name) if adapter_name else _decode(body)
        except ValidationError as error:
            if any(each["loc"] == ("model",) for each in error.errors()):
                raise ApiError(400, "'model' has to be a string.", param="model") from None
            return None
        except (msgspec.MsgspecError, RecursionError):
            return None
        if adapter_name or path == UNLOAD:
            return await self._unload(asked) if asked.lora_name else None
        return await self._load(asked) if asked.lora_name and asked.lora_path else None

    async def _load(self, asked: _Adapter) -> dict[str, Result] | None:
        name, infos = asked.lora_name, self._engines.infos
        if not (targets := self._targets(asked.model, LOAD)):
            return None
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
            reached = [each for each, result in results.items() if result["status"] != _LOST]
            for each in self._engines.having(f"POST {LOAD}"):
                if each not in reached:  # it has joined since, before there was the order
                    self.on_join(each)
            await self._until_told(name, have, is_served=True)
        return results

    async def _unload(self, asked: _Adapter) -> dict[str, Result] | None:
        name, infos = asked.lora_name, self._engines.infos
        ordered = self._ordered(name)
        targets = self._targets(asked.model or ordered, UNLOAD, name)
        # Servers that are not ours do not tell what they were given later.
        having = [
            each
            for each in targets
            if name in infos[each].adapters or (ordered and infos[each].is_external)
        ]
        if not having and ordered is None:
            return await self._ask_all(targets, UNLOAD, {"lora_name": name}) if targets else None
        # First: an engine that joins now is not to be told of it by anybody.
        model = infos[having[0]].model if having else ordered
        self._together.orders.order_adapter(name, model or "", None)
        await self._note(f"unloaded LoRA adapter {name}")
        results = await self._ask_all(having, UNLOAD, {"lora_name": name})
        gone = [each for each, result in results.items() if result["status"] < 400]
        await self._until_told(name, gone, is_served=False)
        return results

    # --- which engines -------------------------------------------------------------

    @property
    def _orders(self) -> dict[str, AdapterOrder]:
        return self._together.orders.orders.adapters

    def _ordered(self, name: str) -> str | None:
        """Return the model that is to have an adapter of this name; None if none is."""
        order = self._orders.get(name)
        return order.model if order is not None and order.load is not None else None

    def _targets(self, model: str | None, path: str, name: str = "") -> list[str]:
        """Return the engines of the model that is meant, the one with the least work first.

        Without a name of it: the only one that takes adapters, or that has the one of this name.
        None where none is up.
        """
        infos = self._engines.infos
        found = self._engines.having(f"POST {path}")
        if model:
            found = [each for each in found if model in (infos[each].model, *infos[each].aliases)]
            if not found and infos and model != self._ordered(name):
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
        """Raise `ApiError` if a model, a route, or an adapter of another model has this name."""
        owners = [self._find_owner(name), self._ordered(name)]
        owners = [owner for owner in owners if owner not in (None, model)]
        for info in self._engines.infos.values():
            is_adapter = name in info.adapters
            if name in (info.model, *info.aliases) and not (is_adapter and info.model == model):
                owners.append(info.model)
        if owners:
            why = f"The name '{name}' is taken: '{owners[0]}' has it."
            raise ApiError(400, why, param="lora_name")

    # --- engines that come later -----------------------------------------------------

    def on_join(self, replica_id: str) -> None:
        """Tell an engine that has connected which adapters it lacks, or has no more."""
        info = self._engines.infos[replica_id]
        told: list[tuple[str, dict[str, Any]]] = []
        for name, order in self._orders.items():
            if order.model != info.model:
                continue
            path = info.adapters.get(name)
            if order.load is None:
                if path is not None:
                    told.append((UNLOAD, {"lora_name": name}))
            elif path is None or (order.load["load_inplace"] and path != order.load["lora_path"]):
                told.append((REGISTER, order.load))
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
            return {"status": _LOST, "answer": "the engine was lost"}
        if path == REGISTER and f"POST {REGISTER}" not in info.routes:
            path = LOAD
        content = msgspec.json.encode(body)
        question = self._engines.ask(replica_id, "POST", path, _HEADERS, content)
        try:
            status, answer = await question.whole(_TIMEOUT_S)
        except NotAnswered as error:
            return {"status": _LOST, "answer": str(error)}
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
    """Raise `ValidationError`, or what msgspec raises for what is no JSON."""
    return _Adapter.model_validate(msgspec.json.decode(body))
