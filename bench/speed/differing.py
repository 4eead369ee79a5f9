"""Do two merged directories hold the same weights? Checked after the peers' race, which would mean little
otherwise.

    python -m bench.speed.differing DIR DIR

Prints how many elements differ, and of how many. Fails where names or shapes differ.
"""

import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open


def tensors(directory: Path) -> dict[str, Any]:
    """Name → the open file that holds it."""
    files = [safe_open(path, "pt") for path in directory.glob("*.safetensors")]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)


def main() -> None:
    n_differing = n_total = 0
    first, second = (tensors(Path(directory)) for directory in sys.argv[1:])
    if alone := first.keys() ^ second.keys():
        raise SystemExit(f"these weights are in one directory only: {alone}")
    for name, file in first.items():
        ours, theirs = file.get_tensor(name), second[name].get_tensor(name)
        if ours.shape != theirs.shape:
            raise SystemExit(f"{name}: {ours.shape} against {theirs.shape}")
        n_differing += int((ours != theirs).sum())
        n_total += ours.numel()
    print(n_differing, n_total)


if __name__ == "__main__":
    main()
