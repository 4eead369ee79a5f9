"""Benchmarks. Each is run from the repository's root: `python -m bench.speed.compute --work DIR`.

speed/ measures seconds, memory/ bytes, faithfulness/ how far merged models are from the unmerged ones;
support/ is what they share, and run.py runs those of speed/ and memory/ for docs/benchmarks.md.
"""
