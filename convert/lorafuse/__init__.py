"""Merge LoRA and QLoRA adapters into safetensors checkpoints, a tile at a time."""
