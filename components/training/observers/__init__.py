"""What happens around the training loop, one file per concern; `base.Observer` says when each hook is called."""
