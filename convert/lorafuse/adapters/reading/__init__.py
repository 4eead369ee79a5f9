"""How an adapter is read: its directory, keys, modules, tensors and config, and what several types share."""
