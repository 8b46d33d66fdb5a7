"""Between ranks of one host there is no network: the receiver reads the sender's memory, and sockets only signal.

``protocol`` says what each end does, as tables without any of it; ``reading`` and ``arena`` move bytes, ``signals``
and ``link`` are one pair of ranks, ``meeting`` finds which pairs can, ``connections`` mixes
them with a network, and by ``nearby`` ranks meet before a call.
"""
