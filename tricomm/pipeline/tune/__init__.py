"""The search for a schedule: depth, split, receives, microbatches, and the order in which hops share a NIC.

Imports ``pipeline.schedule`` and ``pipeline.costs``, never torch.
"""
