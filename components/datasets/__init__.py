"""What the stages that make datasets share: tasks per shard, their results, what is used again, samples to show."""
