"""How assignments travel and when: strategies make messages, messages are cut into chunks, chunks hop in rounds.

Imports ``layout`` and, of ``plan``, ``network`` and ``senders``; never torch.
"""
