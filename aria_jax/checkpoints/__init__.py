"""Models on disk: Orbax checkpoints, safetensors under the published names; knows no training."""
