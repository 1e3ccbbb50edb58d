"""LiteLLM's proxy, in Python: https://github.com/BerriAI/litellm."""

from pathlib import Path

import yaml

from benchmarks.peers.routers.peer import Peer


class LiteLLM(Peer):
    title = "litellm"
    package = "litellm[proxy]==1.106.2"  # 1.107.0 is a compromised release: never that one
    policies = ("least-busy",)

    def command(self, folder: Path, port: int) -> list[str]:
        config = {
            "model_list": [
                {
                    "model_name": self.model,
                    "litellm_params": {
                        "model": f"hosted_vllm/{self.model}",
                        "api_base": f"{url}/v1",
                        "api_key": "none",
                    },
                }
                for url in self.engine_urls
            ],
            "router_settings": {"routing_strategy": self.policy, "num_retries": 0},
            # It listens on loopback only, for as long as the benchmark runs.
            "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
            "litellm_settings": {"request_timeout": 300, "drop_params": False},
        }
        path = folder / "litellm.yaml"
        path.write_text(yaml.safe_dump(config))
        return [
            *(self.binary("litellm"), "--config", str(path)),
            *("--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"),
        ]
