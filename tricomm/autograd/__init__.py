"""Gradients of moves: their layouts, the tape of moves between ranks that hold different things, and the half of a
Resharder that uses both.
"""
