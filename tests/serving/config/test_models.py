"""What each of several models has of its own, and what it takes from the keys outside."""

from pathlib import Path

import pytest

from serving.config import Config, ConfigError, parse, resolved


def each(*models: dict, **outside) -> tuple[Config, ...]:
    return parse({"models": list(models), **outside}).by_model()


def test_one_model_in_the_short_form_is_the_whole_configuration():
    config = parse({"model": "m", "replicas": 2})
    assert config.by_model() == (config,)


def test_what_a_model_leaves_out_is_taken_from_outside():
    a, b = each(
        {"model": "org/a", "replicas": 1},
        {"model": "org/b", "tensor_parallel_size": 4, "engine": {"args": {"dtype": "half"}}},
        replicas=3,
        tensor_parallel_size=2,
        engine={"args": {"max_model_len": 8, "dtype": "auto"}, "drain_timeout_s": 7},
        router={"ttft_target_base_s": 2.0},
    )
    assert (a.model, a.replicas, a.tensor_parallel_size) == ("org/a", 1, 2)
    assert (b.model, b.replicas, b.tensor_parallel_size) == ("org/b", 3, 4)
    assert a.engine.args == {"max_model_len": 8, "dtype": "auto"}
    assert b.engine.args == {"max_model_len": 8, "dtype": "half"}
    assert b.engine.drain_timeout_s == 7
    assert b.router.ttft_target_base_s == 2.0
    assert not a.models


def test_arguments_of_another_kind_of_engine_are_not_taken():
    a, b = each(
        {"model": "a"}, {"engine": "emulated"}, engine={"args": {"dtype": "half"}, "tls": "on"}
    )
    assert a.engine.args == {"dtype": "half"}
    assert b.engine.args == {}
    assert b.engine.is_emulated
    assert b.engine.tls == "on"


def test_names_are_the_served_ones_and_the_aliases():
    a, b, c = each(
        {"model": "org/a", "aliases": ["x"]},
        {"model": "org/b", "served_model_name": ["b", "bee"], "aliases": ["y"]},
        {"model": "org/c"},
    )
    assert a.served_names == ("org/a", "x")
    assert b.served_names == ("b", "bee", "y")
    assert (c.served_names, c.model) == ((), "org/c")


def test_targets_are_a_models_own():
    a, b = each(
        {"model": "a", "ttft_target_base_s": 0.1, "tpot_target_s": 0.02},
        {"model": "b", "ttft_target_s_per_token": 0.5},
        router={"tpot_target_s": {"*": 0.3}},
    )
    assert (a.router.ttft_target_base_s, a.router.tpot_target_s) == (0.1, {"*": 0.02})
    assert (b.router.ttft_target_s_per_token, b.router.tpot_target_s) == (0.5, {"*": 0.3})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model": "m", "models": [{"model": "a"}]}, "model: is the short form for one model"),
        ({"served_model_name": "m", "models": [{"model": "a"}]}, "served_model_name: is the short"),
        ({"models": [{"model": "a"}, {"model": "b", "aliases": ["a"]}]}, "'a' is that of models.0"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "models.1: the name 'a'"),
        ({"models": [{}, {}]}, "the name 'of the bundled model'"),
        ({"models": [{"model": "a", "served_model_name": ["b", "b"]}]}, "'b' is that of models.0"),
        ({"models": [{"aliases": ["a"]}]}, "models.0.aliases: set served_model_name"),
        ({"replicas": {"min": 1, "max": 2}, "idle_sleep_s": 9}, "idle_sleep_s: lets no engine run"),
        (
            {"models": [{"replicas": {"max": 2, "zero_after_s": 3}}], "idle_sleep_s": 9},
            "models.0.idle_sleep_s: is another name for replicas.zero_after_s",
        ),
        (
            {"models": [{"model": "a", "replicas": {"min": 3, "max": 2}}]},
            "models.0.replicas: min: 3 engines are more than max allows, 2",
        ),
        ({"models": [{"replicas": {"min": 0}}]}, "models.0.replicas.max: Field required"),
        ({"models": [{"model": "a", "idle_sleep_s": 0}]}, "models.0.idle_sleep_s: Input should"),
        ({"models": [{"model": "a", "gpus": 2}]}, "models.0.gpus: Extra inputs"),
        ({"models": [{"model": "a", "tensor_parallel_size": 0}]}, "models.0.tensor_parallel_size"),
    ],
)
def test_what_cannot_be_is_said_with_the_key(args, words):
    with pytest.raises(ConfigError) as error:
        parse(args)
    assert words in str(error.value)
    assert not any(word in str(error.value) for word in ("Value error", "integer", "["))


def test_old_names_and_relative_paths_are_taken_in_a_model_too():
    old = {"factory": "benchmarks.emulated:EmulatedEngine", "step_log": "steps"}
    args = resolved({"models": [{"engine": old}]}, Path("/etc/headway"))
    [model] = parse(args).by_model()
    assert model.engine.is_emulated
    assert model.engine.step_log == Path("/etc/headway/steps")


def test_a_model_that_sleeps_has_no_engine_while_nobody_asks():
    """It is another name for a minimum of none, up to the number that there would be else."""
    fixed, bounded, awake = each(
        {"model": "a", "idle_sleep_s": 60},
        {"model": "b", "replicas": {"max": 4, "goodput": 0.95}},
        {"model": "c", "replicas": 2},
        idle_sleep_s=600,
        replicas=3,
    )
    scaling = fixed.scaled_up_to(3).scaling
    assert scaling is not None
    assert (scaling.min, scaling.max, scaling.num_initial, scaling.zero_after_s) == (0, 3, 3, 60)
    scaling = bounded.scaled_up_to(4).scaling
    assert scaling is not None
    assert (scaling.min, scaling.max, scaling.num_initial, scaling.zero_after_s) == (0, 4, 1, 600)
    assert scaling.goodput == 0.95
    assert awake.scaled_up_to(2).scaling.zero_after_s == 600
    [short] = each(idle_sleep_s=5)
    assert short.scaled_up_to(2).scaling.max == 2
    assert parse({"replicas": 2}).scaled_up_to(2).scaling is None
