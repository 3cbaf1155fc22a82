"""edgekit: compress a PyTorch model and lower it, unchanged to the integer, to small devices."""

__version__ = "0.1.0"
