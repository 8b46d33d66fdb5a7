"""What a rank holds of a tensor: meshes, placements, specs, intervals of coordinates, dtypes and the topology of hosts.

Integers only: imports numpy and ``tricomm.errors``, never torch.
"""
