"""What torchrun starts here: the training command, then a look at what outlives it."""

import sys

from gcl_kernels.training.__main__ import main
from tests.conftest import expect_no_gloo_threads

if __name__ == "__main__":
    status = main()
    expect_no_gloo_threads()
    sys.exit(status)
