"""The loop that carries a plan out; it decides nothing."""
