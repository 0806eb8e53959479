"""Benchmarks of wd_fused against torch.optim.SGD: `make bench` runs them, `python -m bench.report` tells."""
