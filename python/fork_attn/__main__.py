"""`python -m fork_attn` is the command `fork-attn`."""

import sys

from fork_attn.cli import main

sys.exit(main())
