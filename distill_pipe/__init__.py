"""distill-pipe: run a target model once, keep what a speculative-decoding draft needs to learn from it.

    corpus -> plan -> engine (vLLM) -> capture -> codec -> shard -> manifest -> reader -> LK loss -> any trainer

`distill_pipe.produce` makes datasets (vLLM, Ray), `distill_pipe.store` is the format (numpy, pyarrow, msgspec), and
`distill_pipe.consume` reads it and computes losses (torch). Produce and consume meet only on disk.
"""

__version__ = "0.1.0"
