"""`python -m fastvq`: the command line."""

import sys

from fastvq.cli import main

sys.exit(main())
