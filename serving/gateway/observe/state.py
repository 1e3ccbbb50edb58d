"""What is a gateway's state at one moment, and that of all together?"""

import msgspec

from router import RouterState
from router.scaling.autoscaler import ScalingState
from serving.core_form import Form
from serving.engine.hardware_watch import HardwareState
from serving.file_watch import FileWatchState
from serving.gateway.cache.response_store import ResponseCacheState
from serving.gateway.http.endpoints.batch.objects import BatchesState
from serving.gateway.tenants.tenants import TenantsState


class ScalerState(msgspec.Struct, frozen=True, kw_only=True):
    """How many engines there are and should be, as the autoscaler has said last."""

    wanted: ScalingState = ScalingState()  # and why
    num_running: int = 0
    num_emptying: int = 0  # of these, those that get nothing new and stop
    ready_in_s: float | None = None  # until the next one should be; None: none starts


class GatewayState(RouterState, frozen=True, kw_only=True):
    """One gateway at one moment, its router's state beside its own: `/headway/state`."""

    gateway_id: str
    rank: int  # among the application's gateways, from 0
    core: Form  # how the router runs there
    metrics_port: int  # on which it answers for itself; 0: none
    num_connections: int  # of clients
    num_open_requests: int
    num_record_bytes: int  # of the records of open requests: what engines have generated
    num_incoming_bytes: int  # received so far of incomplete bodies
    tokens_per_byte: float  # by which the sizes of prompts are estimated
    num_chosen: dict[str, dict[str, int]]  # requests by route, and by what it has chosen
    tenants: TenantsState
    cache: ResponseCacheState
    batches: BatchesState
    hardware: dict[str, HardwareState]  # by engine; one that has not told yet is not there
    files: dict[str, FileWatchState]  # by the setting that names them
    drained: list[str]  # engines that an admin wants to get no new work
    # By model; by "" where there is one. Empty where nobody scales, and until it has been asked.
    scalers: dict[str, ScalerState]


class ServiceState(GatewayState, frozen=True, kw_only=True, omit_defaults=True):
    """All gateways at one moment: what each says, and all together in the fields of one.

    The answer of a gateway that is alone has the fields of one, and nothing else.
    """

    num_gateways: int = 1  # as configured
    # By id: what each has answered, and why others have not.
    gateways: dict[str, GatewayState] = msgspec.field(default_factory=dict)
    missing: dict[str, str] = msgspec.field(default_factory=dict)
