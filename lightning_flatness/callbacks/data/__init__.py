"""Where the samples that a callback measures come from."""
