"""Which requests does a trace hold? Readers: a file in, a `Workload` out.

Where the public originals are:

- Azure LLM inference, code and conversation: github.com/Azure/AzurePublicDataset
  (`data/AzureLLMInferenceTrace_*.csv`, CC-BY-4.0).
- Mooncake, conversation, synthetic and tool calls: github.com/kvcache-ai/Mooncake
  (`FAST25-release/traces/*.jsonl`, Apache-2.0).
- ServeGen: github.com/alibaba/ServeGen generates them (`save_requests_to_csv`, Apache-2.0).
- ShareGPT conversations: `ShareGPT_V3_unfiltered_cleaned_split.json`.
- Coding agents: github.com/callanjfox/kv-cache-tester (`traces/*.json`, Apache-2.0).
"""

from serving.capacity.traces.read import TraceError, read_trace

__all__ = ["TraceError", "read_trace"]
