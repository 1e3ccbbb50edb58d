"""What does routing need to know of a request? From its body and headers to a `Request`."""

import functools
import math
import zlib
from collections.abc import Collection, Sequence

import msgspec

from router import Request, RequestClass
from serving.config import Config
from serving.gateway.http.errors import ApiError
from serving.gateway.intake.bounds import check_logprobs, check_numbers
from serving.gateway.intake.fields import Fields
from serving.gateway.intake.json_body import ENDPOINTS, JsonBody, read_body, with_fields
from serving.gateway.intake.length.tokens_per_byte import TokensPerByte
from serving.gateway.intake.length.wording import NO_WORDING, Wording, read_wording
from serving.gateway.intake.prompt_prefix import PromptPrefix, prompt_prefix
from serving.gateway.intake.prompt_size import PromptSize, measure_prompt
from serving.gateway.intake.request_headers import RequestHeaders
from serving.gateway.intake.routes import Chosen, Routes
from serving.gateway.intake.served_models import ServedModels
from serving.gateway.tenants.tenants import Tenant

# vLLM serves lower numbers first, however long higher ones have to wait. Here each is due so much
# later than the one before: small numbers make a difference, and nobody starves.
_S_PER_PRIORITY = 1.0
# Speech at 128 kbit/s, of which a Whisper encoder makes 50 tokens a second.
_BYTES_PER_SPEECH_TOKEN = 128_000 // 8 // 50
_NO_PREFIX = PromptPrefix()


class Asked(msgspec.Struct, frozen=True):
    """What a client asks for."""

    request: Request
    body: bytes  # as the client says it, in UTF-8
    fields: Fields
    added: dict[str, str | int]  # fields that only an engine gets on top
    num_text_bytes: int  # of its prompt, from which its tokens were estimated; 0: of nothing
    chosen: Chosen | None = None  # by a route; None: the client has named the model


class RequestParser:
    """Reads what clients ask for, and refuses what no engine could answer."""

    def __init__(
        self, config: Config, served_models: ServedModels, routes: Routes | None = None
    ) -> None:
        self.tokens_per_byte = TokensPerByte()  # of all models
        self._tokens_per_byte: dict[str, TokensPerByte] = {}  # by model, once it has answered
        self._config = config
        self._served_models = served_models
        self._routes = routes

    @property
    def route_names(self) -> Collection[str]:
        """The names of routes, which are no models."""
        return self._routes.configs.keys() if self._routes is not None else ()

    def learn_tokens(self, model: str, num_text_bytes: int, num_tokens: int) -> None:
        """Learn from how many tokens a prompt for a model really was; each has its tokenizer."""
        own = self._tokens_per_byte.get(model)
        if own is None:
            own = self._tokens_per_byte[model] = TokensPerByte()
        for ratio in (own, self.tokens_per_byte):
            ratio.learn(num_text_bytes, num_tokens)

    def parse(
        self,
        path: str,
        data: bytes,
        headers: RequestHeaders,
        tenant: Tenant | None,
        *,
        request_id: str,
        now_s: float,
        wants_prefix: bool = False,
        models_elsewhere: Sequence[str] = (),
    ) -> Asked:
        """Return what is asked for at one of `ENDPOINTS`.

        Providers answer for `models_elsewhere`, whatever the engines serve. Raise `ApiError` for
        what is wrong, or not allowed to `tenant`.
        """
        endpoint = ENDPOINTS[path]
        if not endpoint.for_providers:
            models_elsewhere = ()
        body = read_body(path, data, headers.content_type)
        fields = body.fields
        gateway, router = self._config.gateway, self._config.router
        request_class = fields.request_class or headers.request_class
        if request_class is None:
            request_class = router.default_class
            if tenant is not None:
                request_class = tenant.default_class(request_class)
        wording = _wording_of(body)
        session_name = fields.session or headers.session
        session = 0
        if session_name:
            session = _session_hash(tenant.name if tenant is not None else "", session_name)
        may_use = tenant.may_use if tenant is not None else _may_use_all
        asked_model, chosen, routes = fields.model, None, self._routes
        if routes is not None and asked_model is not None and asked_model in routes.configs:
            draft = self._draft(path, body, wording, tenant, request_class, request_id, now_s)
            if session:
                draft = msgspec.structs.replace(draft, session=session)
            chosen = routes.choose(asked_model, path, body, draft, may_use, models_elsewhere)
            asked_model = chosen.model
            body = msgspec.structs.replace(body, data=with_fields(body.data, chosen.fields))
        model, capacity = self._served_models.find_model(
            asked_model, endpoint.task, models_elsewhere, may_use, route=f"POST {path}"
        )
        # vLLM refuses longer prompts. Until it has counted them the
        # estimate must not exceed what the model accepts.
        context = math.inf if capacity is None else capacity.longest_context
        ratio = self._tokens_per_byte.get(model, self.tokens_per_byte).ratio
        size = self._measure_prompts(path, body, context, ratio)
        check_numbers(fields, size, capacity, max_sequences=gateway.max_sequences)
        added: dict[str, str | int] = {}
        most = check_logprobs(fields, size, capacity, max_entries=gateway.max_logprob_entries)
        name, limit = fields.output_limit
        if most is not None:
            limit = added[name] = most
        salt = fields.cache_salt or ""
        tenant_name = ""
        if tenant is not None:
            tenant_name = tenant.name
            tenant.check_class(request_class)
            if (own := tenant.cache_salt(salt)) is not None:
                salt = added["cache_salt"] = own
        if endpoint.is_form:
            added = {}  # an upload passes as it is; vLLM has no salt there
        prefix = _NO_PREFIX
        if wants_prefix:
            prefix = prompt_prefix(model, salt, _text_of(body, is_one=endpoint.is_one), context)
        entry = self._served_models.entry(model)
        request = Request(
            id=request_id,
            model=model,
            num_prompt_tokens=size.num_tokens,
            max_output_tokens=limit,
            num_prompts=size.num_prompts,
            num_sequences=size.num_prompts * fields.num_choices,
            num_bytes=len(body.data),
            fingerprint=hash(body.data),
            tenant=tenant_name,
            weight=tenant.config.weight if tenant is not None else 1.0,
            priority_class=request_class,
            put_off_s=self._put_off_s(fields, headers),
            engines_only=not endpoint.for_providers,
            arrival_s=now_s,
            deadline_s=now_s + router.max_hold_s,
            ttft_target_base_s=None if entry is None else entry.ttft_target_base_s,
            ttft_target_s_per_token=None if entry is None else entry.ttft_target_s_per_token,
            tpot_target_s=None if entry is None else entry.tpot_target_s,
            prefix_hashes=prefix.hashes,
            prefix_block_share=prefix.block_share,
            end_hash=prefix.end_hash,
            answered_hash=prefix.answered_hash,
            answered_share=prefix.answered_share,
            session=session,
            wording=wording.features,
            system_prompt=wording.system_prompt,
        )
        return Asked(request, body.data, fields, added, size.num_text_bytes, chosen)

    def _draft(
        self,
        path: str,
        body: JsonBody,
        wording: Wording,
        tenant: Tenant | None,
        request_class: RequestClass,
        request_id: str,
        now_s: float,
    ) -> Request:
        """Return what is known of a request before its model is."""
        fields = body.fields
        size = self._measure_prompts(path, body, math.inf, self.tokens_per_byte.ratio)
        return Request(
            id=request_id,
            model="",
            num_prompt_tokens=size.num_tokens,
            max_output_tokens=fields.output_limit[1],
            num_prompts=size.num_prompts,
            num_sequences=size.num_prompts * fields.num_choices,
            tenant=tenant.name if tenant is not None else "",
            weight=tenant.config.weight if tenant is not None else 1.0,
            priority_class=request_class,
            arrival_s=now_s,
            wording=wording.features,
            system_prompt=wording.system_prompt,
        )

    def _put_off_s(self, fields: Fields, headers: RequestHeaders) -> float:
        """Return by how much the client's own priority puts its request off, seconds.

        No further than batch work is: past that, nothing would be sure to be served.
        """
        priority = fields.priority if headers.priority is None else headers.priority
        most_s = self._config.router.ttft_target_batch_s
        return max(-most_s, min(most_s, priority * _S_PER_PRIORITY))

    def _measure_prompts(
        self, path: str, body: JsonBody, max_tokens: float, tokens_per_byte: float
    ) -> PromptSize:
        """Return the size of all that is to be read. Raise `ApiError` 400 if that is nothing."""
        endpoint = ENDPOINTS[path]
        needed = endpoint.prompts[0]
        if path == "/v1/chat/completions":  # `type` and `param` are vLLM's
            wrong = functools.partial(ApiError, 400, kind="Bad Request", param=f"body.{needed}")
            if not body.prompts:
                raise wrong(f"'{needed}' is missing or empty")
            if not body.prompts[needed].startswith(b"["):
                raise wrong(f"'{needed}' must be a list of messages")
        if not body.prompts:
            why = f"'{needed}' is missing or empty"
            if path == "/v1/completions":  # vLLM's words
                why = "Either prompt or prompt_embeds must be provided and non-empty."
            raise ApiError(400, why, param=needed)
        if endpoint.is_form:
            num_tokens = len(body.prompts[needed]) // _BYTES_PER_SPEECH_TOKEN
            return PromptSize(max(1, int(min(num_tokens, max_tokens))), 1, 0)
        if (kept := body.fields.truncate_prompt_tokens) is not None and kept >= 0:
            max_tokens = min(max_tokens, kept)
        sizes = [
            measure_prompt(
                field,
                prompt,
                tokens_per_byte=tokens_per_byte,
                max_tokens=max_tokens,
                max_prompts=self._config.gateway.max_sequences,
            )
            for field, prompt in body.prompts.items()
        ]
        if len(sizes) == 1:
            return sizes[0]
        if endpoint.is_one:
            num_text_bytes = [size.num_text_bytes for size in sizes]
            return PromptSize(
                sum(size.num_tokens for size in sizes),
                1,
                sum(num_text_bytes) if all(num_text_bytes) else 0,
            )
        return PromptSize(
            sum(size.num_tokens for size in sizes), sum(size.num_prompts for size in sizes), 0
        )


def _text_of(body: JsonBody, *, is_one: bool) -> bytes:
    """Return the text, in JSON, by which a prompt is known.

    Where several fields make up one, in the order in which templates put them: what all share of
    tools and instructions comes before the messages.
    """
    if is_one and len(body.prompts) > 1:
        return b"".join(reversed(body.prompts.values()))
    return next(iter(body.prompts.values()))


def _wording_of(body: JsonBody) -> Wording:
    if not (body.fields.generates and body.prompts):
        return NO_WORDING
    return read_wording(body.data, next(iter(body.prompts.values())))


def _session_hash(tenant: str, session: str) -> int:
    """Return the same number in every gateway, another one for each tenant's sessions."""
    return zlib.crc32(f"{tenant}\0{session}".encode(errors="surrogatepass"))


def _may_use_all(names: object) -> bool:
    return True
