"""What bytes occupy on their way: the links of hops, how often a strategy uses a NIC, and for how many seconds.

Imports ``layout``, never torch.
"""
