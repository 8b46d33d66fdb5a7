"""Versions of weights from the ranks of one side to those of another: published for all when all have them whole, or
nowhere.
"""
