"""Tools for the rows before training; `python -m psysafe.corpus --help` lists them."""
