"""Entry of the Space and of `python app.py`: flags and settings -> engine -> page -> launch."""

import sys

from ming_app.entry import main

if __name__ == "__main__":
    sys.exit(main())
