"""Ranks of one host whose tensors are on GPUs: bytes are packed into an arena that the peer reads, without NCCL.

``memory`` is what a driver does for that, and ``driver`` CUDA's; ``flags`` are words that streams write and wait for,
``link`` is one pair of ranks, ``meeting`` finds which pairs can, ``connections`` mixes them with NCCL in one call, and
``joining`` makes all of them; ``run`` tells how far the device is, ``alive`` whether it is idle, ``held`` is what is
given back in the end, and ``subgroups`` are communicators of NCCL among some ranks.
"""
