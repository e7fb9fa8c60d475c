"""Catches a tokenizer that is put together from a file of ranks and cuts or merges otherwise than tiktoken does.

tiktoken itself is the oracle, on the twin of Kimi-K2: the same ranks, the same way of cutting, special tokens apart.
"""

import json
import shutil
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tiny_twins import write_twin
from transformers import PreTrainedTokenizerBase

from distill_pipe.errors import UsageError
from distill_pipe.produce.chat import load_tokenizer
from distill_pipe.produce.tiktoken_file import FILE, PATTERN, tokenizer_folder


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi")
    with pytest.MonkeyPatch.context() as patch:
        made = write_twin("kimi-k2", folder)
        # After the twin, which needs the target that the cache holds.
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield made


@pytest.fixture(scope="module")
def oracle(twin: Path) -> tiktoken.Encoding:
    return tiktoken.Encoding("twin", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(str(twin / FILE)),
                             special_tokens={})


words = st.sampled_from(["Hello", " world", "HELLOworld", "中文English混合", "1234567", "it's", "I'LL", " \n\n", "\t",
                         "é", "def f(x):\r\n", "🙂", "naïve", "ǅungla", "ß"])
# The twin's file lacks some bytes that its own text never had: of control characters, and of planes beyond the first.
characters = st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x1FFFF)
texts = st.lists(words | st.text(characters, max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer(twin: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(twin)


@given(texts)
def test_ids_are_those_of_tiktoken(tokenizer: PreTrainedTokenizerBase, oracle: tiktoken.Encoding, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == oracle.encode(text, disallowed_special=())
    assert tokenizer.decode(ids) == text


def test_runs_of_han_characters_are_pieces_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("中文English混合")
    assert [span for _, span in cut] == [(0, 2), (2, 9), (9, 11)]


def test_special_tokens_have_the_ids_of_the_config(twin: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = json.loads((twin / "config.json").read_text())
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [config["eos_token_id"]]
    assert tokenizer.added_tokens_decoder[config["eos_token_id"]].special
    assert tokenizer.chat_template


def test_only_a_model_without_a_tokenizer_of_its_own_is_converted(twin: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", FILE):
        (tmp_path / name).touch()
    assert tokenizer_folder(tmp_path) is None
    assert tokenizer_folder("nobody/not-here") is None
    assert tokenizer_folder(twin) == tokenizer_folder(twin)
    other = tmp_path / "other"
    shutil.copytree(twin, other)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_folder(other) != tokenizer_folder(twin), "with another template it is another tokenizer"
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "OtherTokenizer"}))
    with pytest.raises(UsageError, match="is a Python file of class OtherTokenizer, which is not run"):
        load_tokenizer(other)
