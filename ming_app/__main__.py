"""`python -m ming_app`: see cli.py."""

import sys

from ming_app.cli import main

sys.exit(main())
