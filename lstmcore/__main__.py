"""`python -m lstmcore` is the command `lstmcore`."""

import sys

from lstmcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
