"""Small affine distortions of training images: turns, shears, scalings and shifts (Koch et al. 2015, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from metabench.algorithms.base import uniform
from metabench.episodes import Batch, Episode

CHANCE = 0.5  # that a component takes part
TURN = math.radians(10)  # either way
SHEAR = 0.3  # either way, in x and in y
SCALE = 0.2  # from 1, either way, in x and in y
SHIFT = 2 / 105  # either way, as a share of the image's side: two pixels of the paper's 105


def distorted(episode: Episode) -> Episode:
    """The episode with every image of its support and query sets distorted, each for itself, by its task's seed."""
    support, query = episode.support, episode.query
    shots = support.x.shape[1]
    # not the random numbers that the seeds themselves give, which others draw from
    drawn = components(episode.seeds ^ 1, shots + query.x.shape[1])
    return replace(episode, support=_warped(support, drawn[:, :shots]), query=_warped(query, drawn[:, shots:]))


def components(seeds: Tensor, images: int) -> Tensor:
    """(T, images, 7) float64: angle, shear x and y, scale x and y, shift x and y.

    Each is uniform in its range with probability `CHANCE`, else the one that changes nothing (0; of a scale 1).
    """
    numbers = uniform(seeds, 2, images, 7)
    ranges = torch.tensor([TURN, SHEAR, SHEAR, SCALE, SCALE, SHIFT, SHIFT], dtype=torch.float64)
    swing = (2 * numbers[:, 0] - 1) * ranges * (numbers[:, 1] < CHANCE)
    return swing + torch.tensor([0, 0, 0, 1, 1, 0, 0], dtype=torch.float64)


def warp(x: Tensor, drawn: Tensor) -> Tensor:
    """Square images x (N, C, H, W), each point p moved to turn · shear · scale · p + shift about the middle.

    `drawn` (N, 7) as from `components`. Bilinear; what comes from outside the image is 0, the background.
    """
    angle, shear_x, shear_y, scale_x, scale_y, shift_x, shift_y = drawn.unbind(-1)
    one = torch.ones_like(angle)
    turn = _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    forward = turn @ _matrix(one, shear_x, shear_y, one) @ torch.diag_embed(torch.stack([scale_x, scale_y], -1))
    back = torch.linalg.inv(forward)  # from where in the old image a point of the new one comes
    shift = 2 * torch.stack([shift_x, shift_y], -1)[..., None]  # the side is 2 long: from -1 to 1
    maps = torch.cat([back, -back @ shift], -1).to(x)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, b], -1), torch.stack([c, d], -1)], -2)


def _warped(batch: Batch, drawn: Tensor) -> Batch:
    return replace(batch, x=warp(batch.x.flatten(0, 1), drawn.flatten(0, 1)).reshape(batch.x.shape))
