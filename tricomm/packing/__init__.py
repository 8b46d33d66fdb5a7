"""From a rank's program and the strides of its tensors to copies: programs of boxes, staging, checks and reductions.

Imports torch, ``tricomm.kernels``, ``layout`` and ``plan``; knows no network.
"""
