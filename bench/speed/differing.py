"""Do two merged directories hold the same weights? Checked after the peers' race, which would mean little
otherwise.

    python -m bench.speed.differing DIR DIR

Prints how many elements differ, and of how many. Fails where names or shapes differ.
"""

import sys
from pathlib import Path

from safetensors import safe_open


def main() -> None:
    n_differing = n_total = 0
    first, second = (safe_open(Path(directory) / "model.safetensors", "pt") for directory in sys.argv[1:])
    names = set(first.keys())
    if alone := names ^ set(second.keys()):
        raise SystemExit(f"these weights are in one directory only: {alone}")
    for name in names:
        ours, theirs = first.get_tensor(name), second.get_tensor(name)
        if ours.shape != theirs.shape:
            raise SystemExit(f"{name}: {ours.shape} against {theirs.shape}")
        n_differing += int((ours != theirs).sum())
        n_total += ours.numel()
    print(n_differing, n_total)


if __name__ == "__main__":
    main()
