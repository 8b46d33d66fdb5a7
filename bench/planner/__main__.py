"""``python -m bench.planner``."""

from bench.planner.run import main

main()
