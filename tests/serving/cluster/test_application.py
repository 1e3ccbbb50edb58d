"""What the application is made of."""

import pytest

from serving.cluster.application import build, make_application, plan_application


def served_names(**args) -> tuple[str, ...]:
    """The names that gateways are told of before the first engine is up."""
    return build(args)._bound_deployment.init_args[-1]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({"engine": "emulated"}, ("meta-llama/Llama-3.1-8B",)),
        ({"engine": "emulated", "served_model_name": "m"}, ("m",)),
        ({"engine": "emulated", "served_model_name": ["m", "also-m"]}, ("m", "also-m")),
        ({"engine": "emulated", "model": "acme/m"}, ("acme/m",)),
        ({"engine": {"factory": "somebody.elses:Engine"}, "served_model_name": "m"}, ()),
    ],
)
def test_gateways_know_the_names_of_models(args, names):
    assert served_names(**args) == names


@pytest.mark.parametrize(
    "module", [{"name": "fr", "path": "/fr"}, "fr=/fr", '{"name": "fr", "path": "/fr"}']
)
def test_adapters_are_models(module):
    engine = {"factory": "serving.engine.emulated.engine:EmulatedEngine"}
    engine["args"] = {"lora_modules": [module]}
    assert served_names(engine=engine, served_model_name="m") == ("m", "fr")


def deployments(args, **options) -> dict:
    """The deployments of engines by name."""
    application = make_application(args, plan_application(args), **options)
    return {
        each._bound_deployment.name: each._bound_deployment
        for each in application._bound_deployment.init_args[1]
    }


MODELS = {
    "engine": "emulated",
    "models": [
        {"served_model_name": "a", "replicas": {"min": 1, "max": 3, "initial": 2}},
        {"served_model_name": "b", "replicas": 2, "idle_sleep_s": 60},
        {"served_model_name": "c", "replicas": 1},
    ],
}


class TestEnginesThatComeAndGo:
    """Ray Serve is told the bounds of each model, and of a policy of its own."""

    def test_each_has_bounds_of_its_own(self):
        found = deployments(MODELS)
        bounds = {}
        for name in ("Engine-a", "Engine-b"):
            config = found[name]._deployment_config.autoscaling_config
            bounds[name] = (config.min_replicas, config.initial_replicas, config.max_replicas)
        assert bounds == {"Engine-a": (1, 2, 3), "Engine-b": (0, 2, 2)}
        assert found["Engine-c"]._deployment_config.autoscaling_config is None
        assert found["Engine-c"].num_replicas == 1

    def test_an_edit_does_not_go_back_to_the_initial_number(self):
        found = deployments(MODELS, leaving=())
        config = found["Engine-a"]._deployment_config.autoscaling_config
        assert config.initial_replicas is None

    def test_bounds_do_not_start_engines_anew(self):
        other = {**MODELS, "models": [{**each} for each in MODELS["models"]]}
        other["models"][0]["replicas"] = 2
        assert deployments(MODELS)["Engine-a"].version == deployments(other)["Engine-a"].version

    def test_gateways_are_told_who_comes_and_goes(self):
        application = build(MODELS)
        entries = application._bound_deployment._deployment_config.user_config["models"]
        assert [each["scales"] for each in entries] == [True, True, False]
