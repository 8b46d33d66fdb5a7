"""``python -m bench.model``."""

from bench.model.run import main

main()
