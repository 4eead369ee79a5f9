"""What is done to a tile. `patch.py` is the interface; every other file is a kind of patch, or what kinds
share."""
