"""Training by DeepSpeed: ZeRO 0 to 3, offload, its settings and its checkpoints."""
