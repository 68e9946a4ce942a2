"""Words that settings choose from; a module that imports nothing, so that a refused setting costs no seconds."""

from typing import Literal

Fit = Literal["model", "pad", "crop"]
"""How a picture becomes a square: as the model's folder says; padded with the mean colour (v1.5, section 3.3); its
middle (v1)."""
Checkpointing = Literal["none", "selective", "full"]
"""Of which layers the activations are computed again in the backward pass, from the fastest to the smallest."""
