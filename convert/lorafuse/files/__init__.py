"""Bytes that lie somewhere: tensors, safetensors files, checkpoints, names, JSON and YAML, hashes, the
hub."""
