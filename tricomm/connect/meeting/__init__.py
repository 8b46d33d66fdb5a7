"""The meeting itself: a state machine, the bytes around it, and sockets around those. It imports errors, and how the
transport says that a group is over.
"""
