"""Run the command ``lightning-flatness`` when Python is called as ``python -m lightning_flatness``."""

import sys

from lightning_flatness.cli.main import main

sys.exit(main())
