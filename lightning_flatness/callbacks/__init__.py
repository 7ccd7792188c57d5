"""Lightning callbacks. The computations are in the package ``measure``; the callbacks contain no mathematics."""
