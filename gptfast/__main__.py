"""`python -m gptfast` is the `gptfast` command."""

import sys

from gptfast.cli import main

sys.exit(main())
