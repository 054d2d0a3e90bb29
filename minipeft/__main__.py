"""`python -m minipeft` is `minipeft`."""

import sys

from minipeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
