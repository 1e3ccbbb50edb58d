"""Which model does a request mean whose client names a route, `model: "auto"`?

What its instruction asks for and what else can be seen of it becomes words; `router.core.choice`
chooses by them. From then on the request is as if its client had named that model.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from router import Request
from router.core.choice.chooser import Candidate, Chooser
from router.core.choice.settings import ModelChoiceSettings, RouteSettings
from serving.gateway.http.errors import ApiError, model_not_found
from serving.gateway.intake.fields import ResponseFields
from serving.gateway.intake.json_body import ENDPOINTS, JsonBody
from serving.gateway.intake.length.cues import CUES, FIRST_OPTION, OPTIONS
from serving.gateway.intake.served_models import MayUse, ServedModels
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)

_WORDS = dict(enumerate(CUES)) | {FIRST_OPTION + n: name for n, name in enumerate(OPTIONS)}
_END_OF_WORDS = max(_WORDS) + 1
# Kinds of parts of a message, by OpenAI's APIs and Anthropic's. In a text the quotes are escaped.
_MEDIA = (
    (b'"image_url"', "images"),
    (b'"input_image"', "images"),
    (b'"image"', "images"),
    (b'"audio_url"', "audio"),
    (b'"input_audio"', "audio"),
    (b'"video_url"', "video"),
)
# Where vLLM takes arguments of the chat template, and what says that the client has its own.
_THINKING = frozenset(("/v1/chat/completions", "/v1/responses"))
_OWN_THINKING = (b'"chat_template_kwargs"', b'"reasoning_effort"', b'"effort"')
_MAX_KEPT = 50_000  # sessions, some 200 bytes each


class Chosen(msgspec.Struct, frozen=True):
    """Which model a route has chosen for a request."""

    route: str
    model: str
    why: str  # in a line of ASCII
    fields: dict[str, Any]  # of the body, in place of the client's
    headers: Headers  # that tell the client


class Routes:
    """The routes of a gateway, by the names that clients ask for."""

    def __init__(
        self,
        configs: Mapping[str, RouteSettings],
        chooser: Chooser,
        models: ServedModels,
        *,
        tells_client: bool = True,
    ) -> None:
        """With `tells_client` replies say which model was chosen, and why."""
        self._chooser = chooser
        self._models = models
        self._tells_client = tells_client
        self._kept: OrderedDict[tuple[str, int], str] = OrderedDict()  # by route and session
        self._missing: set[str] = set()  # models that were not found
        self.num_chosen: dict[str, Counter[str]] = {}  # by route and model
        self.use_configs(configs)

    def use_configs(self, configs: Mapping[str, RouteSettings]) -> None:
        """Choose by these from now on."""
        self.configs = configs

    def find_owner(self, name: str) -> str | None:
        """Return the route, or the model of the configuration, that has this name; or None."""
        if name in self.configs:
            return name
        entry = self._models.entry(name)
        return None if entry is None else entry.names[0]

    def choose(
        self,
        name: str,
        path: str,
        body: JsonBody,
        request: Request,
        may_use: MayUse,
        models_elsewhere: Sequence[str],
    ) -> Chosen:
        """Return the model for a request of the route `name`.

        Raise `ApiError` 400 where no route can be asked for, 404 if there is no model for whoever
        asks.
        """
        route = self.configs[name]
        if ENDPOINTS[path].is_form:
            raise _name_a_model(name, "An upload goes to the model that it names")
        if isinstance(body.fields, ResponseFields) and body.fields.previous_response_id:
            raise _name_a_model(name, "A response is kept by the model that gave it")
        candidates = self._candidates(route, path, may_use, models_elsewhere)
        traits = traits_of(request.wording, next(iter(body.prompts.values())))
        session = (name, request.session)
        kept = self._kept.get(session, "") if request.session else ""
        choice = self._chooser.choose(route, traits, candidates, request, request.arrival_s, kept)
        if choice is None:
            raise model_not_found(name)
        if request.session:
            self._keep(session, choice.name)
        counts = self.num_chosen.setdefault(name, Counter())
        counts[choice.name] += 1
        headers: Headers = []
        if self._tells_client:
            headers.append((b"x-headway-model", choice.model.encode()))
            headers.append((b"x-headway-why", choice.why.encode()))
        fields = {"model": choice.model} | _thinking(route.models[choice.name], path, body.data)
        return Chosen(name, choice.model, choice.why, fields, headers)

    def _keep(self, session: tuple[str, int], chosen: str) -> None:
        """Remember what was chosen for a session of a route last."""
        self._kept[session] = chosen
        self._kept.move_to_end(session)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    def _candidates(
        self, route: RouteSettings, path: str, may_use: MayUse, models_elsewhere: Sequence[str]
    ) -> list[Candidate]:
        """Return the models that whoever asks may use for this, and that there are or will be."""
        is_for_all = ENDPOINTS[path].for_providers
        candidates = []
        for name, settings in route.models.items():
            model = settings.model or name
            if not may_use((model,)):
                continue
            try:
                _, capacity = self._models.find_model(
                    model, ENDPOINTS[path].task, models_elsewhere, may_use, route=f"POST {path}"
                )
            except (
                ApiError
            ) as error:  # it does not exist, could not be started, or does other things
                if error.status == 404 and model not in self._missing and is_for_all:
                    self._missing.add(model)
                    logger.warning("routes: there is no model %r", model)
                continue
            entry = self._models.entry(model)
            candidates.append(
                Candidate(
                    name=name,
                    model=model,
                    longest_context=None if capacity is None else capacity.longest_context,
                    is_elsewhere=model in models_elsewhere,
                    has_engines=not (
                        model in models_elsewhere and entry is None and capacity is None
                    ),
                    ttft_target_base_s=None if entry is None else entry.ttft_target_base_s,
                    ttft_target_s_per_token=(
                        None if entry is None else entry.ttft_target_s_per_token
                    ),
                )
            )
        return candidates


def traits_of(features: Sequence[int], prompt: bytes) -> frozenset[str]:
    """Return what a prompt asks for and has, by the words of `router.core.choice.settings`."""
    words = []
    for feature in features:  # ascending
        if feature >= _END_OF_WORDS:
            break
        if feature in _WORDS:
            words.append(_WORDS[feature])
    words += [word for kind, word in _MEDIA if kind in prompt]
    return frozenset(words)


def _thinking(settings: ModelChoiceSettings, path: str, body: bytes) -> dict[str, Any]:
    """Return what makes a model think, or not, unless the client says that itself."""
    if settings.thinking is None or path not in _THINKING:
        return {}
    if any(own in body for own in _OWN_THINKING):
        return {}
    return {"chat_template_kwargs": {"enable_thinking": settings.thinking}}


def _name_a_model(route: str, why: str) -> ApiError:
    return ApiError(400, f"{why}: name it in place of '{route}'.", param="model")
