"""Weights that are sums of vectors out of codebooks (codecs/aqlm.py has the format)."""

import torch

from lorafuse.arithmetic import compiled
from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.scaling import CHUNK_NUMEL

# Bytes of a vector → a dtype of as many. torch copies single elements three times as fast as short rows.
_AS_ONE = {4: torch.float32, 8: torch.float64, 16: torch.complex128}


def decode_vectors(
    codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, arena: Arena
) -> None:
    """values [groups, height, vectors, width] = the sum of vectors in fp32, times a scale, each rounded to
    the dtype of the books, then to that of the values. `codes`: whole numbers [groups, vectors, books],
    modulo the length of a book. `books`: [books, length, height · width]; `scales` [groups], of the same
    dtype."""
    if arena.kernel and compiled.decode_vectors(arena.kernel, codes, books, scales, values):
        return
    n_groups, height, n_vectors, width = values.shape
    step = max(CHUNK_NUMEL // values[0].numel(), 1)
    for first in range(0, n_groups, step):
        part = slice(first, first + step)
        sums = _sums(codes[part], books, arena)
        sums.copy_(sums.to(books.dtype)).mul_(scales[part, None].float())
        # Back in fp32: between two dtypes of 16 bits, torch copies element by element.
        sums.copy_(sums.to(books.dtype))
        values[part].copy_(sums.view(-1, n_vectors, height, width).transpose(1, 2))


def _sums(codes: torch.Tensor, books: torch.Tensor, arena: Arena) -> torch.Tensor:
    """float32 [groups, vectors · height · width]: the sums of vectors, one codebook after another."""
    n_vectors, length = codes.shape[0] * codes.shape[1], books.shape[1]
    numel = n_vectors * books.shape[2]
    sums, term = (arena.get(name, numel, torch.float32) for name in (DECODED_FP32, "vectors.term"))
    vectors = arena.get("vectors.found", numel, books.dtype)
    for number, book in enumerate(books):
        index = codes[:, :, number].reshape(-1).int().bitwise_and_(length - 1)
        _select(book, index, vectors)
        if number == 0:
            sums.copy_(vectors)
        else:
            sums.add_(term.copy_(vectors))
    return sums.view(codes.shape[0], -1)


def _select(vectors: torch.Tensor, index: torch.Tensor, chosen: torch.Tensor) -> None:
    """chosen (1-D) = those rows of `vectors` (2-D) that `index` (int32) names, one after another."""
    one = _AS_ONE.get(vectors.shape[1] * vectors.element_size())
    if one is None:
        torch.index_select(vectors, 0, index, out=chosen.view(-1, vectors.shape[1]))
    else:
        torch.index_select(vectors.view(one).view(-1), 0, index, out=chosen.view(one))
