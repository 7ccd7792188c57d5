"""The command ``lightning-flatness``: measure, compare and picture checkpoints."""
