"""The first rows of weights, however they are stored: the same values as those of the whole weight."""

import pytest
import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs import open_weights
from lorafuse.codecs.first_rows import FirstRows
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folders import open_folder
from lorafuse.files.tensors import Box


@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
def test_rows_and_runs(kind, base):
    weights = open_weights(Checkpoint(open_folder(str(base(kind)))))
    whole = weights["model.layers.0.mlp.down_proj.weight"]
    cut = FirstRows(whole, (20, *whole.spec.shape[1:]))
    arenas = Arena(torch.device("cpu")), Arena(torch.device("cpu"))
    n_cols = whole.spec.n_cols
    every = whole.values(Box.whole(whole.spec), arenas[0]).view(-1, n_cols)
    assert torch.equal(cut.values(Box.whole(cut.spec), arenas[1]).view(-1, n_cols), every[:20])
    rows = cut.values(Box.of_rows(cut.spec, 7, 19), arenas[1])
    assert torch.equal(rows.view(-1, n_cols), every[7:19])
    if whole.as_stored:
        run = cut.values(Box.of_run(cut.spec, 5, 3 * n_cols + 1), arenas[1])
        assert torch.equal(run, every.flatten()[5 : 3 * n_cols + 1])
