"""What the metrics say, and what they do not."""

from serving.engine.external.metrics import CacheSize, Metrics, read_cache_size, read_metrics

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b} c"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 2.0
vllm:num_requests_waiting{engine="0",model_name="a"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="a"} 1.2e+03
vllm:prompt_tokens_cached_total{engine="0",model_name="a"} 200.0
vllm:prompt_tokens_created{engine="0",model_name="a"} 1.7e+09
vllm:time_to_first_token_seconds_count{engine="0",model_name="a"} 10.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="a"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="a"} 40.0
"""
CONFIG = 'vllm:cache_config_info{block_size="%s",engine="%d",num_gpu_blocks="%s"} 1.0\n'


def test_sums_over_the_engines_of_a_server():
    metrics = read_metrics(TEXT)
    assert metrics == Metrics(
        num_running=5,
        num_waiting=4,
        kv_cache_usage=0.375,
        num_prompt_tokens=1200,
        num_cached_tokens=200,
        num_steps=40,
        num_first_tokens=10,
    )
    assert metrics.num_computed_tokens == 1000
    assert metrics.mean_prompt_tokens == 120.0


def test_none_of_vllms():
    assert read_metrics("") is None
    assert read_metrics("python_gc_objects_collected_total 3.0\n") is None
    assert read_metrics("<html>") is None


def test_numbers_that_are_none():
    text = 'vllm:num_requests_running{a="b"} NaN\nvllm:num_requests_waiting 1e99\n'
    assert read_metrics(text) == Metrics()
    assert read_metrics("vllm:kv_cache_usage_perc{} 7\nvllm:num_requests_waiting 1\n") == Metrics(
        num_waiting=1, kv_cache_usage=1.0
    )


def test_cache_size():
    assert read_cache_size(TEXT) is None
    two = CONFIG % (16, 0, 100) + CONFIG % (16, 1, 50)
    assert read_cache_size(TEXT + two) == CacheSize(2400, 16)
    assert read_cache_size(CONFIG % (16, 0, "None")) is None
