"""What the benchmarks of checkpoints and of many ranks share, and the parts of each."""
