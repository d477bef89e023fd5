"""What several tools share: a network and its input."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.checkpoint import load_checkpoint, network_of
from boxteacher.config import Config, from_dict, validate
from boxteacher.distributed import init_distributed
from boxteacher.model import CondInst
from boxteacher.transforms import View, resized_size


def load_network(path: str, given: dict[str, Any]) -> tuple[CondInst, dict[str, Any]]:
    """The network of a checkpoint, the teacher where there is one, ready to predict; and the
    checkpoint. `given` replaces fields of the configuration."""
    device, state = init_distributed(given.get("device", "auto")), load_checkpoint(path)
    cfg = dataclasses.replace(from_dict(state["config"], path), **given)
    validate(dataclasses.replace(cfg, resume=False, init=path))  # the weights are there
    return network_of(state, cfg).to(device), state


def test_view(size: tuple[int, int], cfg: Config) -> View:
    """An image of `size` (height, width) as evaluation sees it."""
    resized = resized_size(*size, cfg.test_size, cfg.test_max_size, cfg.test_scale)
    return View(size, resized, (0, 0, *resized), flip=False)


def network_input(view: View, pixels: np.ndarray) -> Tensor:
    """An image, uint8 RGB [h, w, 3], seen through a view: uint8 [1, 3, H, W], padded with zeros to
    multiples of 32."""
    image = torch.from_numpy(view.image(pixels).copy()).permute(2, 0, 1)
    return F.pad(image, (0, -view.window[3] % 32, 0, -view.window[2] % 32))[None]
