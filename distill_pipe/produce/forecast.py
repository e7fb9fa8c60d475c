"""What a run will cost, before any of it is paid: tokens, bytes by column, devices, and with a probe also hours.

Prompts are rendered for a sample of the corpus, so tokens are exact up to the sample. Bytes come from per-column rates:
those below, measured on SmolLM2-135M, or with a probe those of a real run over a few prompts in a temporary folder. The
trade-off: the rates below are of one target and two kinds of text (chat, code); for another target a probe of two dozen
prompts is worth its minutes. A probe keeps float32 states and encodes them with every codec, so that all are measured.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec
import numpy as np
from msgspec import Struct

from distill_pipe.errors import EngineError, StorageFullError, UsageError
from distill_pipe.produce.chat import Renderer, TemplateError
from distill_pipe.produce.corpus import read_prompts
from distill_pipe.produce.generate import not_ours, prepare
from distill_pipe.produce.job import Job
from distill_pipe.produce.memory import Load, Memory, find_device, plan_memory
from distill_pipe.produce.probe import Probe, run_probe
from distill_pipe.produce.targets import Target
from distill_pipe.produce.vllm_engine import vllm_spec
from distill_pipe.store.codec import bytes_per_element, has_scale
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import read_run, require_same_run
from distill_pipe.store.plan import PlannedPrompt, write_plan_part
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import MAIN_SCHEMA
from distill_pipe.store.spec import EngineSpec, HiddenCodec, RunSpec
