"""What the application is made of."""

import pytest

from serving.cluster.application import build


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
