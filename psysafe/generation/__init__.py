"""Text out: continuous batching over cache slots, sampling, the terminal, files of answers."""
