"""Learning from piano performances in MIDI with JAX and Flax."""

__version__ = "0.1.0"
