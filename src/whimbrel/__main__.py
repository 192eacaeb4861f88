"""`python -m whimbrel` is `whimbrel`."""

import sys

from whimbrel.cli import main

if __name__ == "__main__":
    sys.exit(main())
