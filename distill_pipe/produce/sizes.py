"""Sizes that engines work in and plans count with. Apart from both, so that a plan imports neither torch nor vLLM."""

# Rows of logits that are reduced at once.
CHUNK_ROWS = 256
# Enough for 64 sequences of a small model; on CPU vLLM would otherwise take half of the machine's memory.
CPU_KV_CACHE_BYTES = 1 << 30
CPU_BATCH_TOKENS = 4096
