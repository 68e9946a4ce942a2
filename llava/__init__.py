"""The model, its data and its maths. Stands alone: torch, transformers, pyarrow, Pillow, numpy, safetensors.

Docstrings and presets cite two papers: "v1" is "Visual Instruction Tuning" (arXiv 2304.08485), "v1.5" is "Improved
Baselines with Visual Instruction Tuning" (arXiv 2310.03744).
"""
