"""Which configuration keys are there, and what may they be? Validated once, at the edge.

The same keys are in `applications[0].args` of a Ray Serve config file and in the options of
`headway serve`; a file per section.
"""

from serving.config.access import TenantConfig
from serving.config.cache import CacheConfig
from serving.config.config import Config, parse, read, resolved
from serving.config.engine import EngineConfig
from serving.config.gateway import GatewayConfig
from serving.config.models import ModelConfig
from serving.config.providers import ProviderConfig
from serving.config.section import ConfigError
from serving.config.seen import LogConfig, TracingConfig

__all__ = [
    "CacheConfig",
    "Config",
    "ConfigError",
    "EngineConfig",
    "GatewayConfig",
    "LogConfig",
    "ModelConfig",
    "ProviderConfig",
    "TenantConfig",
    "TracingConfig",
    "parse",
    "read",
    "resolved",
]
