"""The version's number, in a file of its own so that every part of psysafe may import it."""

__version__ = "0.1.0"
