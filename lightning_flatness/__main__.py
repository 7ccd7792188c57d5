"""``python -m lightning_flatness`` is the command ``lightning-flatness``."""

import sys

from lightning_flatness.cli.main import main

sys.exit(main())
