"""What each side of a meeting tells the others, as fixed binary: layouts of its tensors, and rules or maps that say how
one side's tensors are made of another's.
"""
