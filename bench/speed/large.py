"""A merge of a larger model, of which the start is a small part, against `dd` of the result.

    python -m bench.speed.large --work build/bench

The checkpoint has four times the layers of the 1B model. The sides take turns as in peers.py: dd writes the
bytes of the result and syncs them (conv=fdatasync), once into the page cache, as a merge does, and once past
it (oflag=direct). Only the second says what the disk takes. The first fills the page cache with all of the
result, and its CPU time has in it how long the kernel needs to get so much memory, which on a virtual machine
may be most of it; a merge drops what it has written, and needs little. The work directory needs four times
the result.
"""

from pathlib import Path

from bench.support import measure, sides
from bench.support.measure import GB, MB, each, table
from bench.support.ratios import ratio
from bench.support.sides import DD, DIRECT, KERNEL, RESULT

ROUNDS = 3
TIMES = 4  # the layers
SIDES = (KERNEL, DD, DIRECT)


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", TIMES * layers)
    with measure.scratch(work) as outputs:
        runs = sides.in_turns(sides.sides_of(SIDES, base, adapter, outputs), ROUNDS)
        nbytes = (outputs / RESULT).stat().st_size
    rows = [
        (
            name,
            each(sides.walls(of_name)),
            each(sides.cpus(of_name)),
            each([n / MB for n in sides.peaks(of_name)], 0),
        )
        for name, of_name in runs.items()
    ]
    found = {name: ratio(sides.walls(runs[KERNEL]), sides.walls(runs[name])) for name in (DD, DIRECT)}
    ratios = [
        (f"wall, of {name}", f"**{one.median:.2f}**", f"{one.low:.2f} to {one.high:.2f}")
        for name, one in found.items()
    ]
    model = f"of a merge, Llama of {TIMES * layers} layers, {nbytes / GB:.2f} GB"
    header = ("", "wall, s", "CPU, s", "peak memory, MB")
    return f"{table(header, rows)}\n\n{table((model, 'ratio', 'spread'), ratios)}"


if __name__ == "__main__":
    measure.main(__doc__, report)
