"""What a run of a move does, computed before it begins.

``steps`` puts what is bound to tensors into the order in which it is posted, awaited and unpacked. Where tensors stay
in place, ``pulls`` finds what a rank can copy straight out of those of others, and ``direct`` agrees on it with them.
"""
