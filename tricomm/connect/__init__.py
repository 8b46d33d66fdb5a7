"""A group over separate jobs that share no process group: the meeting (a folder of its own), its store, what jobs tell
each other, and versions of weights. It may import all that stands below ``reshard``; only ``store`` and ``world``
import torch.distributed.
"""
