"""`python -m seqeff.cli`."""

import sys

from seqeff.cli import main

sys.exit(main())
