"""A group over separate jobs that share no process group: the meeting, its sockets and its store, what jobs tell each
other, and versions of weights. It may import all that stands below ``reshard``; only ``store`` and ``world`` import
torch.distributed.
"""
