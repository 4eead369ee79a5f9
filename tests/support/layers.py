"""Modules that are no transformers models: layers of each kind, and checkpoints of them."""

import torch
from safetensors.torch import save_file
from torch import nn


class Convolutions(nn.Module):
    """One layer of each kind that LoRA adapts beside linears."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(6, 8, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(2, 5, 2)
        self.point, self.words = nn.Conv2d(4, 4, 1), nn.Embedding(11, 8)


class Chain(nn.Module):
    """Layers of each kind beside Linear, one after the other."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 24)
        self.line, self.grouped = nn.Conv1d(24, 16, 3), nn.Conv1d(16, 12, 3, groups=2)
        self.plane, self.point = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 1)
        self.cube = nn.Conv3d(1, 2, (2, 2, 1))
        self.wide, self.square, self.paired = (
            nn.Conv2d(8, 8, (3, 2)),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 4, 2, groups=2),
        )

    def forward(self, ids):
        x = self.grouped(self.line(self.words(ids).transpose(1, 2)))
        x = self.plane(x[:, None])
        return self.cube(self.paired(self.square(self.wide(self.point(x))))[:, None])


class Large(nn.Module):
    """Weights of several tiles."""

    def __init__(self):
        super().__init__()
        self.one, self.words = nn.Linear(700, 600), nn.Embedding(900, 320)


class OneLinear(nn.Module):
    """A linear layer and its bias."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.one = nn.Linear(n_in, n_out)


def save_module(model, path):
    """A checkpoint of a module that is no transformers model."""
    path.mkdir()
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "none", "architectures": ["None"], "dtype": "float32"}')
    return path


def seeded(make):
    """The module with the random values of seed 0."""
    torch.manual_seed(0)
    return make()
