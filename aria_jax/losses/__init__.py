"""Pure loss functions: arrays in, scalar and metrics out."""
