"""Which model answers a prompt that names a route, by rules and by what is predicted."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from router import RequestClass, Router, RouterSettings
from router.core.choice.chooser import Candidate, Choice
from router.core.choice.settings import RouteSettings
from tests.support.builders import info, req, snapshot, stepped

MODELS = {"small": {"quality": 1, "cost": 1}, "large": {"quality": 3, "cost": 8}}


def route(*rules: dict[str, Any], models: dict[str, Any] | None = None, **more: Any):
    content = {"models": models or MODELS, **more}
    if rules:
        content["rules"] = list(rules)
    return RouteSettings.model_validate(content)


def router_of(*models: str, **engine: Any) -> Router:
    """A router with an idle engine of each model, of its name."""
    router = Router(RouterSettings())
    for model in models:
        router.on_replica_up(model, info(model=model, **engine), 0.0)
    return router


def load(router: Router, model: str, num_tokens: int, seq: int = 1) -> None:
    """Have an engine tell that so much waits in it."""
    waiting = {"num_pending_prefill_tokens": num_tokens, "num_waiting_reqs": 1}
    router.on_snapshot(model, snapshot(seq, **waiting), 0.0)


def choose(
    router: Router,
    settings: RouteSettings,
    *traits: str,
    candidates: tuple[str, ...] = ("small", "large"),
    contexts: dict[str, int] | None = None,
    elsewhere: tuple[str, ...] = (),
    bought: tuple[str, ...] = (),
    num_tokens: int = 10,
    kept: str = "",
    **fields: Any,
) -> Choice | None:
    found = [
        Candidate(
            name=name,
            model=settings.models[name].model or name,
            longest_context=(contexts or {}).get(name),
            is_elsewhere=name in elsewhere or name in bought,
            has_engines=name not in bought,
        )
        for name in candidates
    ]
    request = req("a", num_tokens, **fields)
    return router.chooser.choose(settings, frozenset(traits), found, request, 0.0, kept)


class TestRules:
    TABLE = route(
        {"name": "code", "when": {"asks": ["code"], "has_not": ["images"]}, "models": ["large"]},
        {"when": {"min_prompt_tokens": 100, "max_prompt_tokens": 200}, "models": ["large"]},
        {"when": {"tenants": ["free"], "classes": ["batch"]}, "models": ["small"]},
        {"when": {"has": ["json", "tools"]}, "models": ["large"]},
        {"models": ["small"], "prefer": "fastest"},
    )

    @pytest.mark.parametrize(
        ("traits", "fields", "model", "why"),
        [
            (["code", "brief"], {}, "large", "rule code (asks code, has no images): best of large"),
            (["code", "images"], {}, "small", "rule 5: fastest of small"),
            ([], {"num_tokens": 100}, "large", "rule 2 (100 prompt tokens): "),
            ([], {"num_tokens": 201}, "small", "rule 5: "),
            (
                ["json"],
                {"tenant": "free", "priority_class": RequestClass.BATCH},
                "small",
                "rule 3 (tenant, class batch): ",
            ),
            (["json", "tools"], {"tenant": "free"}, "large", "rule 4 (has json+tools): "),
        ],
    )
    def test_the_first_that_holds_counts_and_says_why(self, traits, fields, model, why):
        choice = choose(router_of("small", "large"), self.TABLE, *traits, **fields)
        assert choice.model == model
        assert choice.why.startswith(why)
        assert choice.why.isascii()
        assert "; first token in " in choice.why

    def test_one_whose_models_are_not_for_this_client_is_passed_by(self):
        router = router_of("small", "large")
        choice = choose(router, self.TABLE, "code", candidates=("small",))
        assert choice.why.startswith("rule 5: fastest of small")
        assert choose(router, self.TABLE, "code", candidates=()) is None
        closed = route({"models": ["large"]})
        assert choose(router, closed, candidates=("small",)) is None

    def test_a_choice_may_be_a_model_in_another_manner(self):
        models = {"quick": {"model": "m", "quality": 1}, "deep": {"model": "m", "quality": 2}}
        choice = choose(router_of("m"), route(models=models), candidates=("quick", "deep"))
        assert (choice.name, choice.model) == ("deep", "m")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"models": {}}, "models"),
            ({"models": MODELS, "rules": []}, "rules"),
            ({"models": MODELS, "rules": [{"models": ["medium"]}]}, "'medium' is none of"),
            ({"models": MODELS, "rules": [{"when": {"asks": ["code"]}}]}, "the last one has to be"),
            ({"models": MODELS, "rules": [{"when": {"asks": ["codes"]}}, {}]}, "rules.0.when.asks"),
            ({"models": {"größer": {}}}, "models"),
            ({"models": MODELS, "explore": 1.5}, "explore"),
        ],
    )
    def test_tables_that_cannot_work_are_refused(self, content, words):
        with pytest.raises(ValidationError, match=words):
            RouteSettings.model_validate(content)


class TestPreference:
    def test_best_and_cheapest_go_by_the_table(self):
        router = router_of("small", "large")
        assert choose(router, route({"prefer": "best"})).name == "large"
        assert choose(router, route({"prefer": "cheapest"})).name == "small"
        equal = route(models={"small": {}, "large": {}})
        assert choose(router, equal).name == "small"  # of equals the first

    def test_fastest_goes_by_what_engines_have_to_do_now(self):
        router, fastest = router_of("small", "large"), route({"prefer": "fastest"})
        load(router, "small", 3000)
        assert choose(router, fastest).name == "large"
        load(router, "large", 6000)
        assert choose(router, fastest).name == "small"

    def test_and_by_the_rates_that_were_measured_and_the_answer_that_is_expected(self):
        """One starts sooner, the other is done sooner: it takes less time per token."""
        router, fastest = router_of("small", "large"), route({"prefer": "fastest"})
        for seq in range(1, 60):
            size = 40 + seq % 5 * 10  # so that base and slope can be told apart
            steps = {
                "small": stepped(2 * seq, 0.080 + size * 1e-5, prefill=size),
                "large": stepped(2 * seq, 0.010 + size * 4e-3, prefill=size),
            }
            decodes = {
                "small": stepped(2 * seq + 1, 0.080, decodes=1 + seq % 3),
                "large": stepped(2 * seq + 1, 0.010, decodes=1 + seq % 3),
            }
            for model in ("small", "large"):
                router.on_snapshot(model, steps[model], float(seq))
                router.on_snapshot(model, decodes[model], float(seq) + 0.5)
        short = choose(router, fastest, num_tokens=90, max_output_tokens=1)
        assert short.name == "small"
        assert choose(router, fastest, num_tokens=90, max_output_tokens=200).name == "large"

    def test_one_that_nobody_has_measured_is_tried_first(self):
        """Measured, one is faster than the guess of the other, which may be faster still."""
        router, fastest = router_of("small", "large"), route({"prefer": "fastest"})
        for seq in range(1, 40):
            router.on_snapshot("small", stepped(seq, 0.002, decodes=1), float(seq))
        choice = choose(router, fastest)
        assert choice.name == "large"
        assert choice.why.endswith("(a guess: its speed is not measured yet)")
        for seq in range(1, 40):
            router.on_snapshot("large", stepped(seq, 0.004, decodes=1), float(seq))
        choice = choose(router, fastest)
        assert choice.name == "small"
        assert choice.why.endswith(" s")

    def test_what_would_be_late_is_passed_over_while_another_is_in_time(self):
        router, best = router_of("small", "large"), route({"prefer": "best"})
        load(router, "large", 5000)
        choice = choose(router, best)
        assert choice.name == "small"
        assert "; not large: late by " in choice.why
        patient = route({"prefer": "best", "max_ttft_s": 1000})
        assert choose(router, patient).name == "large"
        load(router, "small", 9000)
        choice = choose(router, best)
        assert choice.name == "large"
        assert "none in time, the least late of small, large" in choice.why

    def test_what_waits_in_the_gateway_counts_too(self):
        router, best = router_of("small", "large", max_num_seqs=1), route({"prefer": "best"})
        for number in range(30):
            router.on_arrival(req(f"r{number}", 900, model="large"), 0.0)
        choice = choose(router, best, num_tokens=900)
        assert choice.name == "small"
        assert "; not large: late by " in choice.why
        assert choose(router, best).name == "large"  # a short one passes what waits

    def test_a_session_keeps_its_model_while_the_rule_has_it_and_it_is_in_time(self):
        router, best = router_of("small", "large"), route({"prefer": "best"})
        choice = choose(router, best, kept="small")
        assert choice.name == "small"
        assert choice.why.startswith("rule 1: kept of small, large; first token in ")
        assert choose(router, route({"models": ["large"]}), kept="small").name == "large"
        load(router, "small", 5000)
        choice = choose(router, best, kept="small")
        assert choice.name == "large"
        assert "rule 1: best of small, large; not small: late by " in choice.why
        router.on_replica_down("small", 0.0)
        assert choose(router, best, kept="small").name == "large"

    def test_a_share_goes_anywhere(self):
        router = router_of("small", "large")
        names = Counter(choose(router, route(explore=0.2)).name for _ in range(2000))
        assert 0.05 < names["small"] / 2000 < 0.15  # half of the share
        whys = {choose(router, route(explore=1.0)).why.split(";")[0] for _ in range(50)}
        assert whys == {"rule 1: at random (explore) of small, large"}


class TestWhoCanAnswer:
    def test_one_without_a_live_engine_gives_way_and_comes_back(self):
        router, best = router_of("small", "large"), route({"prefer": "best"})
        router.on_replica_draining("large", 0.0)
        choice = choose(router, best)
        assert choice.name == "small"
        assert "; not large: no live engine; " in choice.why
        router.on_replica_draining("large", 0.0, is_draining=False)
        assert choose(router, best).name == "large"
        router.on_replica_down("large", 0.0)
        assert choose(router, best).name == "small"

    def test_before_any_engine_is_up_the_table_decides(self):
        router = Router(RouterSettings())
        assert choose(router, route({"prefer": "cheapest"})).name == "small"
        for prefer, name in (("best", "large"), ("fastest", "small")):
            choice = choose(router, route({"prefer": prefer}))
            assert choice.name == name
            assert choice.why.endswith("; no live engine yet")

    def test_without_engines_one_that_a_provider_has_is_better_than_none(self):
        router = Router(RouterSettings())
        choice = choose(router, route({"prefer": "best"}), elsewhere=("small",))
        assert choice.name == "small"
        assert choice.why == "rule 1: best of small; not large: no provider; by a provider"

    def test_a_model_that_only_providers_have_is_as_live_as_others_but_its_speed_unknown(self):
        router = router_of("small")
        choice = choose(router, route({"prefer": "best"}), bought=("large",))
        assert choice.name == "large"
        assert choice.why == "rule 1: best of small, large; by a provider"
        assert choose(router, route({"prefer": "cheapest"}), bought=("large",)).name == "small"
        fastest = route({"models": ["large", "small"], "prefer": "fastest"})
        assert choose(router, fastest, bought=("large",)).name == "small"
        router.on_replica_down("small", 0.0)
        assert choose(router, fastest, bought=("large",)).name == "large"

    def test_a_prompt_goes_where_its_context_fits(self):
        router, cheapest = router_of("small", "large"), route({"prefer": "cheapest"})
        contexts = {"small": 1000, "large": 4000}
        fits = {"num_tokens": 500, "max_output_tokens": 400}
        assert choose(router, cheapest, contexts=contexts, **fits).name == "small"
        fits["max_output_tokens"] = 480  # the prompt is an estimate, so a little more is kept
        choice = choose(router, cheapest, contexts=contexts, **fits)
        assert choice.name == "large"
        assert "; not small: context too short" in choice.why
        # Into none: the longest says by how much.
        assert choose(router, cheapest, contexts=contexts, num_tokens=9000).name == "large"

    def test_what_a_model_does_not_take_goes_to_one_that_does(self):
        models = {"small": {"takes": []}, "large": {"takes": ["tools", "images"]}}
        router, first = router_of("small", "large"), route({"prefer": "cheapest"}, models=models)
        assert choose(router, first).name == "small"
        choice = choose(router, first, "images", "tools")
        assert choice.name == "large"
        assert "; not small: takes no images+tools; " in choice.why
        assert choose(router, first, "audio").name == "small"  # the engine says that it cannot
