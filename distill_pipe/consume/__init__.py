"""Datasets to gradients: read shards in packed batches, and compute losses against what they hold. Needs torch only."""

from distill_pipe.consume.batch import Batch, PaddedBatch, join
from distill_pipe.consume.dataset import ShardDataset
from distill_pipe.consume.exact import ExactTarget, final_norm
from distill_pipe.consume.fused import FusedLogits
from distill_pipe.consume.losses import (
    LossOutput,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    reverse_kl_loss,
    tv_loss,
)
from distill_pipe.consume.positions import LengthOutput, expected_length_loss, over_positions
from distill_pipe.consume.reader import ShardReader
from distill_pipe.consume.sparse import SparseTarget
from distill_pipe.consume.vocabulary import DraftVocabulary

__all__ = ["Batch", "DraftVocabulary", "ExactTarget", "FusedLogits", "LengthOutput", "LossOutput", "PaddedBatch",
           "ShardDataset", "ShardReader", "SparseTarget", "expected_length_loss", "final_norm", "join", "kl_loss",
           "lk_alpha_loss", "lk_hybrid_loss", "over_positions", "reverse_kl_loss", "tv_loss"]
