"""``python -m bench.kernels``."""

from bench.kernels.run import main

main()
