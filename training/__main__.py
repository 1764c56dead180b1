"""`python -m training`: see cli.py."""

import sys

from training.cli import main

sys.exit(main())
