"""What the benchmarks of the data plane share: photos made on the spot, and sides in processes of their own."""
