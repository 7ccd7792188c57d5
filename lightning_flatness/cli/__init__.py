"""The command ``lightning-flatness``, which measures, compares and plots the networks in checkpoints."""
