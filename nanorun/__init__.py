"""nanorun: which way of training a small language model is fastest, and how sure is that."""

__version__ = "0.1.0"
