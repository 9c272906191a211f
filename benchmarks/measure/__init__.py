"""What the benchmarks share: devices, memory, checks, baselines and the taking of samples."""
