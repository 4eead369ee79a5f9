"""What a run reads: where it lies, what it holds, and whether it changed meanwhile."""
