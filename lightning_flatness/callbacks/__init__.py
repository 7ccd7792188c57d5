"""Lightning callbacks. They measure through ``measure`` and hold no mathematics."""
