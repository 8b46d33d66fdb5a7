"""The simulator: when each action of a schedule begins and ends, given what stages and hops cost.

Rules. A pipeline rank computes its actions in order; each begins when the one before has ended and its inputs are
there. A send or receive is posted when the action before it in the list has ended. A transfer begins when both its ends
are posted and the transfers before it in its queues are off the wire; it then moves at its full speed, or at a fair
share of what it loads together with others; its data is there ``latency_seconds`` after its last byte. These are the
rules of an NCCL stream that runs beside compute; gloo is a little more generous.
"""

from tricomm.errors import PlanError
from tricomm.kinds import checks_kinds
from tricomm.pipeline.costs.clock import run_clock
from tricomm.pipeline.costs.costs import Costs
from tricomm.pipeline.costs.timeline import Timeline
from tricomm.pipeline.schedule.check import Queues, check
from tricomm.pipeline.schedule.communication import with_communication
from tricomm.pipeline.schedule.schedule import Schedule


@checks_kinds
def simulate(schedule: Schedule, costs: Costs, *, queues: Queues = Queues.PER_CHANNEL) -> Timeline:
    """Run a schedule on a clock.

    Args:
        schedule: without sends and receives, all receives count as posted at the start: the best that can be.
        costs: of its stages and channels.
        queues: how transfers wait for each other.

    Raises:
        PlanError: costs of another number of stages or of other edges, or a schedule that cannot run.

    Example:
        >>> from tricomm.pipeline.schedule.generators import eager_one_f_one_b, one_f_one_b
        >>> costs = Costs.uniform(4, 1.0, 1.0, 1.0, hop=1.0)  # F, I, W and each hop take a second
        >>> simulate(one_f_one_b(4, 8), costs).makespan_seconds
        49.0
        >>> simulate(eager_one_f_one_b(4, 8), costs).makespan_seconds
        39.0
    """
    check_costs(schedule, costs)
    if not schedule.has_communication and schedule.channels:
        schedule = with_communication(schedule, receives_ahead=max(map(len, schedule.lists)))
    check(schedule, queues)
    return run_clock(schedule, costs, queues)


def check_costs(schedule: Schedule, costs: Costs) -> None:
    """Refuse costs of another number of stages, or of edges that the schedule has not, which would be left out.

    Raises:
        PlanError: if they are.
    """
    if len(costs.stages) != schedule.stages:
        raise PlanError(
            f"costs are of {len(costs.stages)} stages and the schedule has {schedule.stages}; give one StageCost for "
            "each"
        )
    unknown = sorted({channel.edge for channel in costs.channels} - set(schedule.edges))
    if unknown:
        raise PlanError(
            f"the costs name edge {unknown[0]}, and the schedule has {', '.join(map(str, schedule.edges)) or 'none'}; "
            "pass edges= to the function that makes the schedule, or leave its cost out"
        )
