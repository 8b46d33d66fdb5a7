"""``python -m bench.reshard``."""

import sys

from bench.reshard.run import main

sys.exit(main())
