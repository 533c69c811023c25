"""Learning from piano performances in MIDI with JAX and Flax."""
