"""Datasets to gradients: read shards in packed batches, and compute losses against what they hold. Needs torch only."""

from distill_pipe.consume.batch import Batch, PaddedBatch, join
from distill_pipe.consume.dataset import ShardDataset
from distill_pipe.consume.losses import LossOutput, kl_loss, lk_alpha_loss, lk_hybrid_loss, tv_loss
from distill_pipe.consume.reader import ShardReader
from distill_pipe.consume.sparse import SparseTarget

__all__ = ["Batch", "LossOutput", "PaddedBatch", "ShardDataset", "ShardReader", "SparseTarget", "join", "kl_loss",
           "lk_alpha_loss", "lk_hybrid_loss", "tv_loss"]
