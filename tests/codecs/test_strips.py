"""Codes of tiles that are parts of many stored rows, collected in strips."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.codecs import strips
from lorafuse.codecs.strips import Run, Strips


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_byte_once_at_its_place(data):
    """Blocks of rows, as of experts, in any order of tiles, which may touch several strips."""
    n_blocks, times = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    stride = data.draw(st.integers(1, 150))
    stored = torch.arange(n_blocks * times * stride, dtype=torch.int32).remainder(251).to(torch.uint8)
    rows = stored.view(n_blocks, times, stride)
    cuts = sorted({0, stride, *data.draw(st.lists(st.integers(1, stride), max_size=6))})
    tiles = [(block, a, b) for block in range(n_blocks) for a, b in pairwise(cuts)]
    before, strips.STRIP_NBYTES = strips.STRIP_NBYTES, data.draw(st.sampled_from([1, 200, 1000, 10**6]))
    collected, pieces = Strips("codes"), []
    try:
        for block, first, last in data.draw(st.permutations(tiles)):
            part = torch.cat([torch.zeros(3, dtype=torch.uint8), rows[block, :, first:last].reshape(-1)])
            run = Run(block * times * stride + first, 3, last - first, times, stride)
            pieces += collected.add(run, part)
            part.zero_()  # the buffer is another tile's now
    finally:
        strips.STRIP_NBYTES = before
    found, n_written = torch.zeros_like(stored), 0
    for piece in pieces:
        assert piece.tensor == "codes"
        written = bytes(piece.bytes_of(memoryview(b"")))
        n_written += len(written)
        found[piece.at : piece.at + len(written)] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    assert n_written == len(stored) and torch.equal(found, stored)
    assert not collected._open


def test_threads():
    """Each strip is complete in one of them, and its pieces are as long as it is wide."""
    stored = torch.randint(0, 256, (64, 4096), dtype=torch.uint8)
    collected = Strips("codes")

    def add(first):
        run = Run(first, 0, 32, 64, 4096)
        return list(collected.add(run, stored[:, first : first + 32].reshape(-1)))

    with ThreadPoolExecutor(8) as threads:
        made = [piece for pieces in threads.map(add, range(0, 4096, 32)) for piece in pieces]
    assert [(piece.at, piece.nbytes) for piece in made] == [(0, stored.numel())]
    assert bytes(made[0].bytes_of(memoryview(b""))) == bytes(stored.view(-1).tolist())
