"""`python -m pyllamabatch` is the same as `pyllamabatch`."""

import sys

from pyllamabatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
