"""Weights of all kinds, and what the encoder of compressed-tensors' layouts makes of them in tiles."""

import numpy as np
import symmetric_oracle as oracle
import torch
from hypothesis import strategies as st

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.symmetric import E4M3, INT4, INT8
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.symmetric import SymmetricEncoder
from lorafuse.files.tensors import SAFETENSORS_NAMES, Box, TensorSpec

WORDS = {"fp8": (E4M3, None), "w8a16": (INT8, 32), "w4a16": (INT4, 128)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ARENA = Arena(torch.device("cpu"))


def encoded(weight, values, word, group, cuts):
    """The stored tensors of a weight, made from `values` in tiles that end at these rows; what a reader
    decodes, and the number of clipped elements."""
    spec = TensorSpec(SAFETENSORS_NAMES[str(weight.dtype).removeprefix("torch.")], tuple(weight.shape))
    encoder = SymmetricEncoder("m.weight", spec, WORDS[word][0], group)
    made = {tensor.name: bytearray(tensor.nbytes) for tensor in encoder.tensors}
    decoded, n_clipped, n_cols = [], 0, weight.shape[1]
    for first, last in zip([0, *cuts], [*cuts, len(weight)], strict=True):
        tile = values[first:last].reshape(-1)
        box = Box.of_rows(spec, first, last)
        buffer = torch.empty(encoder.tile_nbytes(len(tile)), dtype=torch.uint8)
        result = encoder.encode(
            FinishedTile(first * n_cols, last * n_cols, tile, tile, (), box), buffer, ARENA
        )
        for piece in result.pieces:
            part = buffer[piece.start : piece.start + piece.nbytes].numpy().tobytes()
            made[piece.tensor][piece.at : piece.at + piece.nbytes] = part
        decoded.append(encoder.decode(result, ARENA).clone())
        n_clipped += result.n_clipped
    tensors = {
        tensor.name: torch.frombuffer(made[tensor.name], dtype=getattr(torch, tensor.spec.torch_name)).view(
            tensor.spec.shape
        )
        for tensor in encoder.tensors
    }
    return tensors, torch.cat(decoded), n_clipped


@st.composite
def weights(draw):
    """Rows of very different sizes, some of them zero, some with a single value; down to denormals."""
    dtype = draw(st.sampled_from(DTYPES))
    word = draw(st.sampled_from(list(WORDS)))
    group = draw(st.sampled_from([32, 128])) if word == "w4a16" else WORDS[word][1]
    n_rows = draw(st.integers(1, 5))
    n_cols = (group or draw(st.integers(1, 40))) * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    _, lowest, largest = oracle.FLOATS[dtype]
    x = rng.standard_normal((n_rows, n_cols))
    for row in range(n_rows):
        kind = draw(st.sampled_from(["plain", "zero", "single", "tiny", "huge", "ties", "negative zero"]))
        if kind in ("zero", "single", "negative zero"):
            x[row] = -0.0 if kind == "negative zero" else 0
        if kind == "single":
            x[row, rng.integers(n_cols)] = rng.standard_normal()
        if kind == "tiny":
            x[row] *= 2.0 ** (lowest - draw(st.integers(-6, 12)))
        if kind == "huge":
            x[row] = np.clip(x[row] / np.abs(x[row]).max() * largest, -largest, largest)
        if kind == "ties":
            x[row] = rng.integers(-255, 256, n_cols) / 2
    x[rng.random(x.shape) < 0.1] *= 0
    values = torch.from_numpy(x).float().clamp(-largest, largest)
    cuts = sorted(draw(st.sets(st.integers(1, n_rows - 1)))) if n_rows > 1 else []
    return values, dtype, word, group or n_cols, cuts
