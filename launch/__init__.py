"""How to start the same programs on a laptop, several processes, a SLURM cluster or a TPU pod."""
