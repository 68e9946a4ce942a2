"""The training loop of both stages: what stands here runs on plain torch, without a cluster."""
