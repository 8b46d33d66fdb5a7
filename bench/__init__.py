"""Benchmarks: every figure a ratio measured in one run; run them as ``python -m bench.NAME``."""

import os

# Before torch is imported, which reads it then: in a namespace without a name server it would warn of each connection
# that the other side has no host name.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
