"""Routes in a configuration, and the example of docs/auto.md."""

import re
from pathlib import Path

import pytest

from serving.config import ConfigError, parse, read
from serving.planning.model_size import ModelSize
from serving.planning.service.service_plan import plan_service
from tests.serving.planning.test_service_plan import GIB, h100s

DOCUMENT = Path(__file__).resolve().parents[3] / "docs/auto.md"
TWO = {"models": {"small": {}, "large": {}}}


def test_a_route_is_no_model():
    model = {"model": "org/x", "served_model_name": "x", "aliases": ["auto"]}
    for models in ({"models": [model]}, {"model": "org/x", "served_model_name": "auto"}):
        with pytest.raises(ConfigError, match=r"routes\.auto: is the name of a model"):
            parse({**models, "routes": {"auto": TWO}})
    with pytest.raises(ConfigError, match="routes: a route needs a name"):
        parse({"routes": {"": TWO}})


def test_what_is_wrong_in_a_table_is_named_with_its_key():
    rules = {**TWO, "rules": [{"models": ["medium"]}]}
    with pytest.raises(ConfigError, match=r"routes\.auto.*rules\.0\.models: 'medium' is none of"):
        parse({"routes": {"auto": rules}})
    with pytest.raises(ConfigError, match=r"routes\.auto\.explore"):
        parse({"routes": {"auto": {**TWO, "explore": 2}}})


def test_the_example_fits_on_eight_gpus_and_every_choice_is_one_of_its_models(tmp_path):
    [example] = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.S)
    path = tmp_path / "config.yaml"
    path.write_text(example)
    config = read(path)
    sizes = [ModelSize(gib * GIB) for gib in (61, 16, 4)]
    plan = plan_service(config, h100s(), sizes)
    gpus = [each.num_replicas * each.num_gpus_per_replica for each in plan.plans]
    assert (gpus, sum(gpus)) == ([4, 3, 1], 8)
    names = {name for each in config.by_model() for name in each.served_names}
    for route in config.routes.values():
        assert set(route.model_names) == names
        # Each is there for some rule.
        assert {name for rule in route.rules for name in rule.models} == route.models.keys()
