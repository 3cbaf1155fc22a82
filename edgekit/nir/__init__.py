"""NIR, the exchange format of spiking networks: read, write, run in float64, from and to frozen programs (docs/spiking.md)."""

from edgekit.nir.file import read, write
from edgekit.nir.interpreter import Trace, interpret

__all__ = ["Trace", "interpret", "read", "write"]
