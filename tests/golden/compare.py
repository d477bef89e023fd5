"""Where golden values lie, and how they are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
SHARED = Path(__file__).parents[3] / "shared" / "golden"
SOURCES = pytest.mark.parametrize("source", ["compact", "shared"])


def load(name: str, source: str) -> dict[str, np.ndarray]:
    """The compact subset that lies here, or the whole file if there is a shared folder of them."""
    path = HERE / f"{name}.npz" if source == "compact" else SHARED / f"golden_{name}.npz"
    if not path.is_file():
        pytest.skip(f"no golden values at {path}")
    with np.load(path) as data:
        return {key: data[key] for key in data.files}


def summarize(tensor: Tensor) -> np.ndarray:
    """64 values of a tensor, spread over it: what the golden files keep of large ones."""
    flat = tensor.detach().double().flatten().numpy()
    steps = np.arange(64, dtype=np.uint64) * np.uint64(2654435761)
    return flat[steps % np.uint64(flat.size)]


def assert_summary(tensor: Tensor, golden: dict[str, np.ndarray], key: str, tolerance: float):
    """Errors are relative to the largest of the values."""
    if f"{key}/vals" not in golden:
        return
    assert tuple(tensor.shape) == tuple(golden[f"{key}/shape"]), key
    wanted = golden[f"{key}/vals"].astype(np.float64)
    scale = max(np.abs(wanted).max(), 1e-12)
    assert np.abs(summarize(tensor) - wanted).max() <= tolerance * scale, key
    mean = tensor.detach().double().mean().item()
    assert abs(mean - golden[f"{key}/mean"]) <= tolerance * scale, key


def match(boxes: Tensor, labels: Tensor, wanted_boxes, wanted_labels) -> Tensor:
    """For each wanted detection the index of the nearest of its class: equals may swap places."""
    wanted_boxes = torch.as_tensor(wanted_boxes, dtype=boxes.dtype)
    distance = (boxes[None] - wanted_boxes[:, None]).abs().amax(-1)
    distance[labels[None] != torch.as_tensor(wanted_labels)[:, None]] = torch.inf
    index = distance.argmin(1)
    assert sorted(index.tolist()) == list(range(len(boxes)))
    return index


def unpack(packed: np.ndarray, shape) -> Tensor:
    """Masks [K, H, W] from the golden files' bits."""
    count, height, width = (int(side) for side in shape)
    bits = np.unpackbits(packed, axis=1)[:, : height * width]
    return torch.from_numpy(bits.reshape(count, height, width)).bool()
