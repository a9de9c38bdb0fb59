"""`python -m qexport` is the same as `qexport`."""

import sys

from qexport.cli import main

sys.exit(main())
