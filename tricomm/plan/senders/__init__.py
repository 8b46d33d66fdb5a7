"""Who sends each task: policies that name one holder, and those that divide a task among its holders.

Imports ``layout`` and, of ``plan``, ``network`` and the tasks; never torch.
"""
