"""When was an engine last seen to live, and to get on with its work?

Two may tell: the replica, by its snapshots, and what computes in it, which speaks for itself where
it is a process of its own (`Router.on_alive`). An engine for which only the latter speaks is
*mute*: its API layer is busy with one huge reply, say. It lives, but nothing is known of its state.
"""

import math

# Heartbeats without a snapshot, after which an engine that lives is mute.
_MUTE_HEARTBEATS = 2.0


class VitalSigns:
    """The last signs of one engine."""

    __slots__ = ("_alive_s", "_heartbeat_s", "_num_steps", "is_mute", "mute_s", "progress_s")

    def __init__(self, heartbeat_s: float) -> None:
        """`heartbeat_s` is the longest time between two of its snapshots."""
        self._heartbeat_s = heartbeat_s
        self._alive_s = -math.inf  # when what computes last spoke
        self._num_steps = 0  # that it had made then
        self.progress_s = -math.inf  # when it was last heard to get on
        self.is_mute = False
        self.mute_s = -math.inf  # when it was so last

    def silent_s(self, snapshot_s: float, now_s: float) -> float:
        """Return the seconds since its last sign of life, a snapshot of `snapshot_s` included."""
        return now_s - max(snapshot_s, self._alive_s)

    def receive_snapshot(self, now_s: float) -> None:
        """Note that it is not mute."""
        if self.is_mute:
            self.is_mute, self.mute_s = False, now_s

    def receive_alive(
        self, num_steps_total: int, num_requests: int, snapshot_s: float, now_s: float
    ) -> bool:
        """Note what computes told of itself. Return whether the engine is mute from now on."""
        was_mute = self.is_mute
        self.is_mute = now_s - snapshot_s > _MUTE_HEARTBEATS * self._heartbeat_s
        if self.is_mute:
            self.mute_s = now_s
        # A mute engine may have ended all that its last snapshot told of.
        if num_steps_total != self._num_steps or (self.is_mute and not num_requests):
            self.progress_s = now_s
        self._num_steps = num_steps_total
        self._alive_s = now_s
        return self.is_mute and not was_mute
