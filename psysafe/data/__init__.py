"""From a file of rows to micro-batches: read, apply the chat template, encode, pack."""
