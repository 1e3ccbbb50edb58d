"""`serving.engine.vllm.stats` on its own, fed as vLLM feeds it."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.types import AdapterState

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_a_step_lasts_by_the_cores_clock() -> None:
    """Records that a busy event loop gets to all at once tell their steps' times all the same."""
    from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

    from serving.engine.vllm.scheduler import ENDED
    from serving.engine.vllm.stats import EngineStats

    scheduler = SimpleNamespace(long_prefill_token_threshold=64, max_num_batched_tokens=512)
    engine_stats = EngineStats(SimpleNamespace(scheduler_config=scheduler))
    times_s = []
    for ended_s in (100.0, 100.006, 100.013):
        stats = SchedulerStats(num_running_reqs=1, kv_connector_stats={ENDED: ended_s})
        stats.iteration_details = SchedulerIterationDetails(0, 0, 0, 1, 1, 0.0)
        engine_stats.record(stats, None)
        times_s.append(engine_stats.step_s)
    assert times_s == pytest.approx([0.0, 0.006, 0.007])


def test_a_step_that_overlaps_the_next_has_half_of_eithers_tokens() -> None:
    """Two that decode, then a prompt of 256 beside them: its time is in two records, anyhow."""
    from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

    from serving.engine.vllm.scheduler import ENDED, NEXT
    from serving.engine.vllm.stats import EngineStats

    scheduler = SimpleNamespace(long_prefill_token_threshold=64, max_num_batched_tokens=512)
    engine_stats = EngineStats(SimpleNamespace(scheduler_config=scheduler))
    found = []
    for ended_s, own, following in [
        (100.000, (0, 2), (0, 2)),
        (100.015, (0, 2), (256, 2)),
        (100.018, (256, 2), (0, 3)),
        (100.024, (0, 3), (0, 0)),
    ]:
        stats = SchedulerStats(
            num_running_reqs=1, kv_connector_stats={ENDED: ended_s, NEXT: following}
        )
        stats.iteration_details = SchedulerIterationDetails(0, 1, own[0], own[1], own[1], 0.0)
        engine_stats.record(stats, None)
        found.append((engine_stats.step_num_prefill_tokens, engine_stats.step_num_decode_reqs))
    assert found[1:] == [(128, 2), (128, 3), (0, 2)]


def test_a_worker_tells_what_it_has_and_what_loading_took() -> None:
    """Room for one that steps can use, and for one more in memory."""
    from serving.engine.vllm.adapters.worker import AdapterWorker

    class Manager:
        """As vLLM's, with numbers for weights."""

        def __init__(self) -> None:
            self.cached: list[int] = []
            self._adapter_manager = SimpleNamespace(lora_index_to_id=[None])

        def list_adapters(self) -> set[int]:
            return set(self.cached)

        def add_adapter(self, request) -> bool:
            number = request.adapter_id
            if number not in self.cached:
                self.cached = [*self.cached, number][-2:]
            self._adapter_manager.lora_index_to_id = [number]
            return True

    manager = Manager()
    worker = AdapterWorker()
    worker.model_runner = SimpleNamespace(lora_manager=manager)
    worker.watch_adapters()
    assert worker.held_adapters() == ([], [], [], 0.0)

    def add(number: int) -> None:
        assert manager.add_adapter(SimpleNamespace(adapter_id=number, load_inplace=False))

    add(1)
    add(1)
    add(2)
    resident, cached, loads, swap_s = worker.held_adapters()
    assert (resident, cached, swap_s) == ([2], [1], 0.0)
    assert [number for number, took_s in loads if took_s > 0.0] == [1, 2]
    add(1)  # from memory
    assert worker.held_adapters()[3] > 0.0
    assert worker.held_adapters()[2] == loads


async def test_what_loading_an_adapter_took_is_no_steps_time() -> None:
    """Nor what an adapter took that was loaded between two steps; and workers are asked once."""
    from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

    from serving.engine.vllm.adapters.watch import AdapterWatch
    from serving.engine.vllm.scheduler import ADAPTERS, ENDED
    from serving.engine.vllm.stats import EngineStats

    class Llm:
        num_asked = 0

        async def collective_rpc(self, method: str) -> list:
            self.num_asked += 1
            return [([1], [], [(1, 0.9)], 0.0)]

    llm = Llm()
    scheduler = SimpleNamespace(long_prefill_token_threshold=64, max_num_batched_tokens=512)
    engine_stats = EngineStats(SimpleNamespace(scheduler_config=scheduler))
    watch = engine_stats.adapters = AdapterWatch(llm, SimpleNamespace(max_loras=1))
    router = SimpleNamespace(routes=[])
    lora = SimpleNamespace(lora_path="/a", lora_int_id=1)
    models = SimpleNamespace(lora_requests={})
    state = SimpleNamespace(openai_serving_models=models)
    await watch.attach(SimpleNamespace(state=state, router=router), engine_stats.tell)

    def step(ended_s: float, *used: str) -> float:
        reports = {ENDED: ended_s, ADAPTERS: list(used)}
        stats = SchedulerStats(num_running_reqs=1, kv_connector_stats=reports)
        stats.iteration_details = SchedulerIterationDetails(0, 0, 0, 1, 1, 0.0)
        engine_stats.record(stats, None)
        return engine_stats.step_s

    step(100.0)
    assert step(100.01) == pytest.approx(0.01)
    watch._held = AdapterState()  # nothing is resident
    models.lora_requests["a"] = lora
    assert watch.paths == {"a": "/a"}
    assert step(101.0) == 0.0
    assert step(102.0, "a") == 0.0  # it was evicted meanwhile, for all that is known
    await watch._asking
    assert watch.state({}).resident == ["a"]
    assert watch.state({}).load_s == {"a": 0.9}
    num_asked = llm.num_asked
    assert step(102.02, "a") == pytest.approx(0.02)
    assert step(102.03, "another") == pytest.approx(0.01)  # that is not served by its name
    assert llm.num_asked == num_asked


def test_vllms_own_metrics_are_passed_on_under_the_engines_id(served):
    """What the boards in deploy/grafana ask for, in place of vLLM's own number of an engine."""
    assert served.ask({"prompt": "Once", "ignore_eos": True}).status_code == 200
    text = served.http.get("/metrics/engines").raise_for_status().text
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    values = {each.name: each.value for each in samples}
    assert {each.labels["engine"] for each in samples} == {"r0"}
    assert values["vllm:generation_tokens_total"] >= 8
    assert values["vllm:num_requests_running"] == 0
    assert values["vllm:inter_token_latency_seconds_count"] >= 7
    assert values["vllm:request_queue_time_seconds_count"] >= 1
    assert values["headway_engine_metrics_up"] == 1
