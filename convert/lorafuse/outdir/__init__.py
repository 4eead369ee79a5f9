"""How a result becomes OUT_DIR: made where nobody looks, checked, and given its name when it is complete."""
