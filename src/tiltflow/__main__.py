"""`python -m tiltflow`, and so `accelerate launch -m tiltflow train CONFIG`."""

import sys

from tiltflow.cli import main

sys.exit(main())
