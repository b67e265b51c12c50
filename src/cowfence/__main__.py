"""``python -m cowfence``: the command line."""

import sys

from cowfence.cli.main import entry

sys.exit(entry())
