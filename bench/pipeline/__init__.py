"""Pipelines on emulated hosts against bounds, proven optima, peers and the paper."""
