"""What does `/v1/models` say? vLLM's cards, for the models of engines and of providers."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from router import EngineInfo
from router.core.choice.settings import RouteSettings


def make_cards(
    infos: Iterable[EngineInfo],
    models_elsewhere: Iterable[str],
    created_s: int,
    order: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Return cards by id: each engine's model, its further names and adapters; then providers'.

    In vLLM's order: there are clients that take the first one. Models in the given `order`, others
    after them by name.
    """
    cards: dict[str, dict[str, Any]] = {}
    places = {name: place for place, name in enumerate(order)}
    for info in sorted(infos, key=lambda each: (places.get(each.model, len(places)), each.model)):
        for name in (info.model, *info.aliases):
            is_adapter = name in info.adapters
            cards[name] = _card(
                name,
                created_s,
                # Clients load the tokenizer from there, vLLM's own benchmark among them.
                root=info.adapters[name] if is_adapter else info.root or info.model,
                parent=info.model if is_adapter else None,
                max_model_len=None if is_adapter else info.max_model_len or None,
            )
    for name in sorted(models_elsewhere):
        if name not in cards:
            cards[name] = _card(name, created_s, owned_by="provider", root=name)
    return cards


def make_route_cards(
    routes: Mapping[str, RouteSettings], cards: Mapping[str, dict[str, Any]], created_s: int
) -> dict[str, dict[str, Any]]:
    """Return the cards of routes, by id, that can choose any of the models on `cards`."""
    found = {}
    for name, route in routes.items():
        models = [cards[model] for model in route.model_names if model in cards]
        if models:
            contexts = [each["max_model_len"] for each in models if each["max_model_len"]]
            longest = max(contexts, default=None)
            found[name] = _card(name, created_s, root=name, max_model_len=longest)
    return found


def _card(name: str, created_s: int, *, owned_by: str = "headway", **fields: Any) -> dict[str, Any]:
    """Return one card, with the fields of vLLM's `ModelCard` and their order."""
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": owned_by,
        "root": fields["root"],
        "parent": fields.get("parent"),
        "max_model_len": fields.get("max_model_len"),
        "permission": [
            {
                "id": f"modelperm-{uuid.uuid4().hex}",
                "object": "model_permission",
                "created": created_s,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }
