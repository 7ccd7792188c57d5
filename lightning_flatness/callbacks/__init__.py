"""Lightning callbacks. They contain no mathematics: the computations are in ``lightning_flatness.measure``."""
