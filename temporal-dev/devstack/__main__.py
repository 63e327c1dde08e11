"""`python temporal-dev/devstack …`: the command line of the dev stack."""

import sys
from pathlib import Path

# Run by its path, Python looks for modules in this directory instead of the one that holds it.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from devstack.cli import main  # noqa: E402 # only now it is found

sys.exit(main())
