"""Random places that PEFT draws again from a seed instead of saving them."""

import numpy as np
import torch

# From here on torch.randperm shuffles in another way (ATen/native/TensorFactories.cpp, randperm_cpu).
_LARGE = (2**32 - 1) // 20
_CHUNK = 1 << 18


def first_of_randperm(n: int, n_first: int, seed: int) -> torch.Tensor:
    """`torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_first]`, int64, without the n · 8
    bytes."""
    generator = torch.Generator().manual_seed(seed)
    return _from_the_front(n, n_first, generator) if n < _LARGE else _inside_out(n, n_first, generator)


def _from_the_front(n: int, n_first: int, generator: torch.Generator) -> torch.Tensor:
    """A Fisher–Yates shuffle whose step i swaps i with i + draw % (n − i): the first places are final after
    as many steps, and only the places that were moved are kept."""
    moved: dict[int, int] = {}
    first = torch.empty(n_first, dtype=torch.int64)
    words = _words((n_first + 1) // 2, generator).tolist()
    # A word is two 32-bit draws, the first one its upper half.
    draws = (half for word in words for half in divmod(word, 1 << 32))
    for i, draw in zip(range(n_first), draws, strict=False):
        j = i + draw % (n - i)
        first[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return first


def _inside_out(n: int, n_first: int, generator: torch.Generator) -> torch.Tensor:
    """A shuffle whose step i puts what is at draw % (i + 1) at i, and i there: it takes all steps to know the
    first places."""
    first = np.empty(n_first, dtype=np.int64)
    for start in range(0, n, _CHUNK):
        steps = np.arange(start, min(start + _CHUNK, n), dtype=np.uint64)
        places = _words(len(steps), generator) % (steps + np.uint64(1))
        for i in np.flatnonzero((places < n_first) | (steps < n_first)).tolist():
            step, place = start + i, int(places[i])
            if step < n_first:
                first[step] = first[place]
            first[place] = step
    return torch.from_numpy(first)


def _words(n_words: int, generator: torch.Generator) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """The generator's next 64-bit words."""
    words: np.ndarray[tuple[int], np.dtype[np.int64]]
    words = torch.empty(n_words, dtype=torch.int64).random_(-(2**63), None, generator=generator).numpy()
    return words.view(np.uint64)
