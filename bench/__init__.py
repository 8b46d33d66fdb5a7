"""Benchmarks: every figure a ratio measured in one run; run them as ``python -m bench.NAME``."""
