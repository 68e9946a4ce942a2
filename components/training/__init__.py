"""What both training stages share: settings, the Ray Train job, one worker's life, DeepSpeed, checkpoints."""
