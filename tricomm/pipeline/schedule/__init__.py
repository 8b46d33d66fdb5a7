"""Schedules as values: their actions, notations, generators and the proof that they cannot deadlock.

Imports ``tricomm.errors`` and itself, never torch.
"""
