"""What do `/v1/files` and `/v1/batches` answer?"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from router import RequestClass
from serving.config import Config
from serving.gateway.http.endpoints.batch.batches import Batches
from serving.gateway.http.endpoints.batch.lines import BATCH_ENDPOINTS
from serving.gateway.http.endpoints.batch.objects import Batch, StoredFile, read_metadata, window_s
from serving.gateway.http.endpoints.batch.upload import Upload, discard_rest
from serving.gateway.http.endpoints.bodies import read_json
from serving.gateway.http.errors import ApiError
from serving.gateway.tenants.tenants import Tenants

logger = logging.getLogger(__name__)

_MAX_FILES_PAGE, _MAX_BATCHES_PAGE, _USUAL_BATCHES_PAGE = 10_000, 100, 20
_MAX_UPLOADS = 8  # at a time
_MAX_OPEN_BATCHES = 1000  # of one tenant
_CHUNK_BYTES = 256 * 2**10
# OpenAI's bounds of `expires_after`.
_LEAST_KEEP_S, _MOST_KEEP_S = 3600, 2_592_000


class BatchEndpoints:
    """Answers for files and batches, each tenant for its own; others' are not there for it."""

    def __init__(self, config: Config, tenants: Tenants, batches: Batches | None) -> None:
        """Without `batches` everything is answered with how to have them."""
        self._config = config.batch
        self._tenants = tenants
        self._batches = batches
        self._num_reserved_bytes = 0  # of uploads under way
        self._num_uploads = 0

    def routes(self) -> list[Route]:
        """Return what is answered here."""
        table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("POST", "/v1/files", self.upload_file),
            ("GET", "/v1/files", self.list_files),
            ("GET", "/v1/files/{id}", self.get_file),
            ("DELETE", "/v1/files/{id}", self.delete_file),
            ("GET", "/v1/files/{id}/content", self.get_content),
            ("POST", "/v1/batches", self.create_batch),
            ("GET", "/v1/batches", self.list_batches),
            ("GET", "/v1/batches/{id}", self.get_batch),
            ("POST", "/v1/batches/{id}/cancel", self.cancel_batch),
        ]
        return [Route(path, answer, methods=[method]) for method, path, answer in table]

    # --- files ----------------------------------------------------------------------

    async def upload_file(self, request: Request) -> Response:
        """Take in a file of requests."""
        batches, tenant = self._open(request)
        if self._num_uploads >= _MAX_UPLOADS:
            raise ApiError(
                429, "Too many uploads at a time.", kind="RateLimitError", retry_after_s=1.0
            )
        files, run = batches.keeping.files, batches.keeping.database.run
        announced = int(request.headers.get("content-length") or self._config.max_file_bytes)
        num_reserved = min(announced, self._config.max_file_bytes)
        self._num_uploads += 1
        self._num_reserved_bytes += num_reserved
        path = files.new_path()
        try:
            upload = Upload(request, self._config.max_file_bytes)
            if not await run(files.make_room, self._num_reserved_bytes):
                raise ApiError(
                    413,
                    "There is no room for the file: batch.max_bytes "
                    f"({self._config.max_bytes} bytes) is reached. Delete files, or wait for "
                    "batches to end.",
                    kind="invalid_request_error",
                    param="file",
                    code="storage_full",
                )
            await upload.write_to(path)
            keep_s = _check_form(upload.fields)
            file = await run(files.add, tenant, upload.filename or "", "batch", path, keep_s)
        except ApiError:
            await discard_rest(request, self._config.max_file_bytes)
            raise
        except OSError as error:
            logger.exception("an upload cannot be written")
            message = f"The file cannot be kept: {error.strerror} (batch.dir)."
            raise ApiError(507, message, kind="InternalServerError") from None
        finally:
            self._num_uploads -= 1
            self._num_reserved_bytes -= num_reserved
            await asyncio.to_thread(path.unlink, missing_ok=True)
        return _json(file.to_api())

    async def list_files(self, request: Request) -> Response:
        """Answer with the caller's files, a page at a time."""
        batches, tenant = self._open(request)
        files, run = batches.keeping.files, batches.keeping.database.run
        query = request.query_params
        limit = _limit(request, _MAX_FILES_PAGE, _MAX_FILES_PAGE)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise _invalid("order", "'order' has to be 'asc' or 'desc'.")
        after = None
        if (name := query.get("after")) is not None:
            after = await run(files.find, tenant, name) or _unknown_cursor(name)
        page, has_more = await run(
            files.page, tenant, after, limit, query.get("purpose", ""), ascending=order == "asc"
        )
        return _page([file.to_api() for file in page], has_more=has_more)

    async def get_file(self, request: Request) -> Response:
        """Answer with a file's object."""
        _, file = await self._find_file(request)
        return _json(file.to_api())

    async def get_content(self, request: Request) -> Response:
        """Answer with what is in a file."""
        batches, file = await self._find_file(request)
        path = batches.keeping.files.path(file.id)
        return StreamingResponse(
            _chunks(path),
            headers={
                "content-type": "application/octet-stream",
                "content-length": str(file.bytes),
                "content-disposition": "attachment",
            },
        )

    async def delete_file(self, request: Request) -> Response:
        """Delete a file that no batch reads any more."""
        batches, file = await self._find_file(request)
        files, run = batches.keeping.files, batches.keeping.database.run
        if (user := await run(files.user, file.id)) is not None:
            raise ApiError(
                409,
                f"The file is in use by batch '{user}', which has not ended: cancel that first.",
                kind="invalid_request_error",
                param="file_id",
                code="file_in_use",
            )
        await run(files.remove, file.id)
        return _json({"id": file.id, "object": "file", "deleted": True})

    async def _find_file(self, request: Request) -> tuple[Batches, StoredFile]:
        batches, tenant = self._open(request)
        file_id = request.path_params["id"]
        file = await batches.keeping.database.run(batches.keeping.files.find, tenant, file_id)
        if file is None:
            raise _not_found("File", file_id)
        return batches, file

    # --- batches --------------------------------------------------------------------

    async def create_batch(self, request: Request) -> Response:
        """Begin a batch."""
        batches, tenant = self._open(request)
        caller = self._tenants.authenticate(request.headers.raw)
        body = await read_json(request)
        if not isinstance(body, dict):
            raise _invalid("body", "The request body is not an object.")
        for name in ("input_file_id", "endpoint", "completion_window"):
            if not isinstance(body.get(name), str):
                raise _invalid(name, f"Missing required parameter: '{name}'.")
        if body["endpoint"] not in BATCH_ENDPOINTS:
            raise _invalid(
                "endpoint",
                f"Invalid value: '{body['endpoint']}'. Supported values are: "
                + ", ".join(f"'{path}'" for path in BATCH_ENDPOINTS),
            )
        seconds = window_s(body["completion_window"])
        metadata = read_metadata(body.get("metadata"))
        keep_s = _keep_s(body.get("output_expires_after"), "output_expires_after")
        if caller is not None:
            caller.tenant.check_class(RequestClass.BATCH)
        keeping, run = batches.keeping, batches.keeping.database.run
        file = await run(keeping.files.find, tenant, body["input_file_id"])
        if file is None:
            raise _not_found("File", body["input_file_id"], "input_file_id")
        if file.purpose != "batch":
            raise _invalid("input_file_id", f"The file's purpose is '{file.purpose}', not 'batch'.")
        if await run(keeping.store.num_open, tenant) >= _MAX_OPEN_BATCHES:
            raise ApiError(
                429,
                f"You have {_MAX_OPEN_BATCHES} batches that have not ended.",
                kind="RateLimitError",
                code="batch_limit_exceeded",
                retry_after_s=60.0,
            )
        batch = await run(
            keeping.store.add,
            file,
            body["endpoint"],
            body["completion_window"],
            seconds,
            metadata,
            keep_s,
        )
        batches.on_new()
        return _json(batch.to_api())

    async def list_batches(self, request: Request) -> Response:
        """Answer with the caller's batches, the newest first, a page at a time."""
        batches, tenant = self._open(request)
        store, run = batches.keeping.store, batches.keeping.database.run
        limit = _limit(request, _MAX_BATCHES_PAGE, _USUAL_BATCHES_PAGE)
        after = None
        if (name := request.query_params.get("after")) is not None:
            after = await run(store.find, tenant, name) or _unknown_cursor(name)
        page, has_more = await run(store.page, tenant, after, limit)
        return _page([batch.to_api() for batch in page], has_more=has_more)

    async def get_batch(self, request: Request) -> Response:
        """Answer with a batch's object."""
        batches, tenant = self._open(request)
        batch = await batches.keeping.database.run(
            batches.keeping.store.find, tenant, request.path_params["id"]
        )
        return _json(_found(batch, request).to_api())

    async def cancel_batch(self, request: Request) -> Response:
        """Have a batch end soon; what has been answered by then is kept."""
        batches, tenant = self._open(request)
        found = await batches.keeping.database.run(
            batches.keeping.store.cancel, tenant, request.path_params["id"]
        )
        batch = _found(found, request)
        if batch.status not in ("cancelling", "cancelled"):
            raise ApiError(
                409,
                f"Cannot cancel a batch with status '{batch.status}'.",
                kind="invalid_request_error",
            )
        batches.on_changed(batch)
        return _json(batch.to_api())

    # --- who asks -------------------------------------------------------------------

    def _open(self, request: Request) -> tuple[Batches, str]:
        """Return what has batches and the caller's tenant, "" where nobody needs a key."""
        caller = self._tenants.authenticate(request.headers.raw)
        if self._batches is None:
            raise ApiError(
                404,
                "The Batch API is off here: it needs a folder to keep files in (batch.dir).",
                kind="NotFoundError",
                code="batch_api_off",
            )
        return self._batches, caller.tenant.name if caller is not None else ""


def _check_form(fields: dict[str, str]) -> int | None:
    """Return for how long an upload is to be kept, seconds; None if it does not say."""
    purpose = fields.get("purpose")
    if purpose != "batch":
        raise _invalid("purpose", f"Invalid value: {purpose!r}. Supported values are: 'batch'.")
    prefix = "expires_after["
    given = {
        name.removeprefix(prefix).removesuffix("]"): value
        for name, value in fields.items()
        if name.startswith(prefix)
    }
    return _keep_s(given or None, "expires_after")


def _keep_s(given: Any, name: str) -> int | None:
    """Return what `expires_after` says, seconds; None for nothing."""
    if given is None:
        return None
    with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError):
        seconds = int(given["seconds"])
        if given["anchor"] == "created_at" and _LEAST_KEEP_S <= seconds <= _MOST_KEEP_S:
            return seconds
    raise _invalid(
        name,
        f"'{name}' has to have 'anchor' 'created_at' and 'seconds' from {_LEAST_KEEP_S} to "
        f"{_MOST_KEEP_S}.",
    )


def _limit(request: Request, most: int, usual: int) -> int:
    text = request.query_params.get("limit", str(usual))
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= most:
        raise _invalid("limit", f"'limit' has to be a number from 1 to {most}.")
    return int(text)


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, kind="invalid_request_error", param=param)


def _unknown_cursor(name: str) -> NoReturn:
    raise _invalid("after", f"'after': there is no '{name}'.")


def _not_found(what: str, name: str, param: str = "id") -> ApiError:
    return ApiError(
        404, f"No such {what} object: {name}", kind="invalid_request_error", param=param
    )


def _found(batch: Batch | None, request: Request) -> Batch:
    if batch is None:
        raise _not_found("Batch", request.path_params["id"])
    return batch


def _page(objects: list[dict[str, Any]], *, has_more: bool) -> Response:
    return _json(
        {
            "object": "list",
            "data": objects,
            "first_id": objects[0]["id"] if objects else None,
            "last_id": objects[-1]["id"] if objects else None,
            "has_more": has_more,
        }
    )


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
            yield chunk
    finally:
        file.close()
