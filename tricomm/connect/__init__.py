"""A group over separate jobs that share no process group: the meeting, what jobs tell each other, and versions of
weights (folders of their own); its store, and who pushes to whom. It may import all that stands below ``reshard``; only
``store`` and ``world`` import torch.distributed.
"""
