"""Pixels of the tiny vision tower's training are those of its image processor, channel by channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from components.backbones import vision


def test_each_channel_is_normalised_by_its_own_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "MEAN", [0.2, 0.5, 0.8])
    monkeypatch.setattr(vision, "STD", [0.1, 0.2, 0.4])
    pictures = [np.full((2, 2, 3), 51, np.uint8)]  # 0.2 of 255
    found = vision.pixels(pictures)[0, :, 0, 0]
    assert torch.allclose(found, torch.tensor([0.0, -1.5, -1.5]), atol=1e-6)
