"""The on-disk format: what a dataset is, how a shard is committed, and how it is checked. See schemas/FORMAT.md."""
