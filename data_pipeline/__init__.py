"""From MIDI files to Grain batches, on machines that need no accelerator (never imports jax)."""
