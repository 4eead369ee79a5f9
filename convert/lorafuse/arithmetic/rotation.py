"""What OFT and BOFT share: block-diagonal rotations R, held as R − I so that an update stays small, and
Cayley's formula."""

from collections.abc import Callable

import torch

CHUNK_NUMEL = 1 << 16


def excess_nbytes(n_blocks: int, block: int) -> int:
    """Bytes of what `excess` returns, and of its float64 temporaries."""
    return 4 * n_blocks * block * block + 8 * 8 * max(CHUNK_NUMEL, block * block)


def excess(
    stored: torch.Tensor, block: int, minus_identity: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """fp32 [n_blocks, block, block] from `stored` [n_blocks, …], some blocks at a time in float64."""
    result = torch.empty(len(stored), block, block, dtype=torch.float32, device=stored.device)
    step = max(CHUNK_NUMEL // (block * block), 1)
    for start in range(0, len(stored), step):
        result[start : start + step] = minus_identity(stored[start : start + step].double())
    return result


def cayley_minus_identity(skew: torch.Tensor) -> torch.Tensor:
    """(I − Q)(I + Q)⁻¹ − I = −2 Q (I + Q)⁻¹ for skew-symmetric Q [n, b, b]."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    result: torch.Tensor = torch.linalg.solve(eye + skew, -2 * skew, left=False)
    return result


def through(rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """rows [n, cols] times the block-diagonal matrix of `blocks` [cols / b, b, b], or of one block [1, b, b]
    repeated.

    Returns [n, cols / b, b].
    """
    parts = rows.view(len(rows), -1, blocks.shape[-1])
    if len(blocks) == 1:
        return parts @ blocks[0]
    return torch.bmm(parts.transpose(0, 1), blocks).transpose(0, 1)
