"""The model, its data and its maths. Stands alone: torch, transformers, pyarrow, Pillow, numpy, safetensors."""
