"""Pipelines whose hops hide behind compute: schedules as values, their proof, their simulation and their tuning."""

from tricomm.pipeline.actions import Action, Channel, Edge, Kind
from tricomm.pipeline.check import Queues, check, receive_ring
from tricomm.pipeline.communication import with_communication
from tricomm.pipeline.costs import Costs, StageCost, TransferCost
from tricomm.pipeline.edge import EdgeTensor, Link
from tricomm.pipeline.executor import Executor
from tricomm.pipeline.generators import (
    eager_one_f_one_b,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    warmed_up,
    zero_bubble,
)
from tricomm.pipeline.in_turn import in_turn
from tricomm.pipeline.measure import Measurement
from tricomm.pipeline.schedule import Schedule, chain
from tricomm.pipeline.simulate import simulate
from tricomm.pipeline.stage import Stage, WithLoss
from tricomm.pipeline.tied import Tied
from tricomm.pipeline.timeline import Timeline
from tricomm.pipeline.torch_csv import read_csv, write_csv
from tricomm.pipeline.tune import Candidate, Limits, Tuned, tune
from tricomm.pipeline.way import Turns
from tricomm.pipeline.workload import Workload

__all__ = [
    "Action",
    "Candidate",
    "Channel",
    "Costs",
    "Edge",
    "EdgeTensor",
    "Executor",
    "Kind",
    "Limits",
    "Link",
    "Measurement",
    "Queues",
    "Schedule",
    "Stage",
    "StageCost",
    "Tied",
    "Timeline",
    "TransferCost",
    "Tuned",
    "Turns",
    "WithLoss",
    "Workload",
    "chain",
    "check",
    "eager_one_f_one_b",
    "gpipe",
    "in_turn",
    "interleaved_one_f_one_b",
    "one_f_one_b",
    "read_csv",
    "receive_ring",
    "simulate",
    "tune",
    "warmed_up",
    "with_communication",
    "write_csv",
    "zero_bubble",
]
