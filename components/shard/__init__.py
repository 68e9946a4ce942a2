"""Stage `shard`: pictures with their texts, from any source, as Parquet files of the one dataset schema."""

from components.shard.component import Shard
from components.shard.settings import ShardSettings

__all__ = ["Shard", "ShardSettings"]
