"""Pipelines whose hops hide behind compute: schedules as values, their proof, their simulation and their tuning."""

from tricomm.pipeline.costs.costs import Costs, StageCost, TransferCost
from tricomm.pipeline.costs.simulate import simulate
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.costs.workload import Workload
from tricomm.pipeline.run.clip import clip_gradients
from tricomm.pipeline.run.edge import Link
from tricomm.pipeline.run.edges.directed_link import PerDirectionFifo
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.executor import Executor
from tricomm.pipeline.run.measure import Measurement, StepComparison
from tricomm.pipeline.run.stage import Stage, WithLoss
from tricomm.pipeline.run.step import Evaluation
from tricomm.pipeline.run.tied import Tied
from tricomm.pipeline.schedule.actions import Action, Channel, Edge, Kind
from tricomm.pipeline.schedule.check import Queues, check, receive_ring
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.generators import (
    eager_one_f_one_b,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    warmed_up,
    zero_bubble,
)
from tricomm.pipeline.schedule.schedule import Schedule, chain
from tricomm.pipeline.schedule.torch_csv import read_csv, write_csv
from tricomm.pipeline.tune.evaluate import Candidate, Limits
from tricomm.pipeline.tune.in_turn import in_turn
from tricomm.pipeline.tune.tune import Tuned, tune

Turns = PerDirectionFifo
"""The old name of PerDirectionFifo, kept for one version."""

__all__ = [
    "Action",
    "Candidate",
    "Channel",
    "Costs",
    "Edge",
    "EdgeTensor",
    "Evaluation",
    "Executor",
    "Kind",
    "Limits",
    "Link",
    "Measurement",
    "PerDirectionFifo",
    "Queues",
    "Schedule",
    "Stage",
    "StageCost",
    "StepComparison",
    "Tied",
    "Timeline",
    "TransferCost",
    "Tuned",
    "Turns",
    "WithLoss",
    "Workload",
    "chain",
    "check",
    "clip_gradients",
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
