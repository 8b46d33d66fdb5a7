"""Schedules at work: stages, the edges between them, the executor of one rank, and what it measures.

Imports torch, ``reshard`` and the other folders of ``pipeline``.
"""
