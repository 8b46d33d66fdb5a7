"""What a schedule costs: stages and hops in seconds, the simulator and its timeline.

Imports ``layout``, ``plan`` and ``pipeline.schedule``, never torch.
"""
