"""`python -m bench.gpu_session`: another name of `python -m bench.gpu`."""

import sys

from bench.gpu.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
