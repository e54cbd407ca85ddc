"""`python -m megatron_mopd`: the `mopd` command, for torchrun's -m."""

import sys

from megatron_mopd.cli import main

if __name__ == "__main__":
    sys.exit(main())
