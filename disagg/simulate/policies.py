"""The router's policies by name, each as a way to choose in a simulated cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from disagg.router.costs.decide import POLICIES
from disagg.simulate.by_cost import LowestCost
from disagg.simulate.by_load import LeastLoaded
from disagg.simulate.handoff import Ground
from disagg.simulate.in_turn import InTurn
from disagg.simulate.routing import Routing
from disagg.simulate.simulation import RoutingOf
from disagg.simulate.worker import SimulatedWorker

NAMES = tuple(POLICIES)


def routing_of(name: str, *, max_local_prefill: int = 0) -> RoutingOf:
    """How the policy of this name is made for a cluster."""
    if name == "least-loaded":
        return LeastLoaded
    if name == "round-robin":
        return InTurn
    return partial(LowestCost, policy=POLICIES[name], max_local_prefill=max_local_prefill)
