"""The base as training saw it: how training quantized it, which weights, and what they became."""
