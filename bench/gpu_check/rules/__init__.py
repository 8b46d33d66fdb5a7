"""What tricomm relies on of CUDA streams and NCCL, one rule each: the same code on a GPU and on the tests' stand-in.

Two ranks keep a rule together, each with its own ``Bed``. Where the stand-in is stricter than a GPU has to be, the rule
says what it found by raising ``Laxer``, which is no failure on a GPU.
"""

from collections.abc import Callable, Sequence

from bench.gpu_check.rules.bed import Bed
from bench.gpu_check.rules.broadcasts import (
    a_broadcast_waits_for_its_sender,
    broadcasts_match_in_order,
    communicators_on_one_stream_come_to_their_end,
    the_first_broadcast_blocks_the_host,
    to_abort_ends_a_broadcast,
    what_was_sent_arrives_though_the_sender_has_gone,
)
from bench.gpu_check.rules.failures import (
    a_group_that_failed_leaves_the_thread_usable,
    a_new_kernel_waits_for_those_that_run,
    aborts_go_together,
    errors_surface_late,
    nothing_watches_by_itself,
    the_first_message_of_a_pair_blocks_the_host,
    to_abort_ends_what_waits_here,
    to_abort_frees_a_host_that_loads_a_kernel,
)
from bench.gpu_check.rules.order import (
    a_receive_holds_up_no_computation,
    communicators_do_not_wait_for_each_other,
    communicators_in_one_order_come_to_their_end,
    groups_are_done_in_order,
    high_priority_goes_first,
    messages_match_in_order,
    one_queue_holds_up_all,
    streams_have_queues_of_their_own,
    waiting_orders_the_stream,
)

RULES: Sequence[Callable[[Bed], None]] = (
    waiting_orders_the_stream,
    groups_are_done_in_order,
    messages_match_in_order,
    communicators_do_not_wait_for_each_other,
    a_receive_holds_up_no_computation,
    communicators_in_one_order_come_to_their_end,
    high_priority_goes_first,
    streams_have_queues_of_their_own,
    to_abort_ends_what_waits_here,
    aborts_go_together,
    errors_surface_late,
    a_group_that_failed_leaves_the_thread_usable,
    the_first_message_of_a_pair_blocks_the_host,
    a_new_kernel_waits_for_those_that_run,
    to_abort_frees_a_host_that_loads_a_kernel,
    nothing_watches_by_itself,
    broadcasts_match_in_order,
    a_broadcast_waits_for_its_sender,
    the_first_broadcast_blocks_the_host,
    to_abort_ends_a_broadcast,
    communicators_on_one_stream_come_to_their_end,
    what_was_sent_arrives_though_the_sender_has_gone,
)
ONE_QUEUE_RULES: Sequence[Callable[[Bed], None]] = (one_queue_holds_up_all,)
"""Of ranks that have one hardware queue, CUDA_DEVICE_MAX_CONNECTIONS=1."""
