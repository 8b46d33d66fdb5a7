"""``python -m bench.cluster``."""

import sys

from bench.cluster.cluster import main

sys.exit(main())
