"""Pipelines whose hops hide behind compute: schedules as values, their proof, their simulation and their tuning."""

from tricomm.pipeline.actions import Action, Channel, Edge, Kind
from tricomm.pipeline.communication import with_communication
from tricomm.pipeline.generators import (
    eager_one_f_one_b,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    warmed_up,
    zero_bubble,
)
from tricomm.pipeline.schedule import Schedule, chain

__all__ = [
    "Action",
    "Channel",
    "Edge",
    "Kind",
    "Schedule",
    "chain",
    "eager_one_f_one_b",
    "gpipe",
    "interleaved_one_f_one_b",
    "one_f_one_b",
    "warmed_up",
    "with_communication",
    "zero_bubble",
]
