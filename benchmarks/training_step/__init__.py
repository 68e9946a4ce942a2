"""What `benchmarks/train_step.py` compares: shapes and data, the two ways to take a step, the optimizer's layout."""
