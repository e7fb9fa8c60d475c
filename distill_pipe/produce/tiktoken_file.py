"""Kimi's tokenizer without its Python file: from the `tiktoken.model` beside it.

The model's repository has its tokenizer as code, which is never run here. What the code knows beside the file is how
text is cut before merging, and that is written down below; special tokens are in tokenizer_config.json, and ids between
them are reserved. The result is a folder that transformers and vLLM read as any other. The trade-off: a tokenizer that
is code and cuts text in another way would be converted wrongly, so one of another class is refused.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distill_pipe.errors import UsageError
from distill_pipe.produce.smollm2 import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE: Final = "tiktoken.model"
CLASS: Final = "TikTokenTokenizer"
_CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = (rf"[{kind}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kind in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
# Runs of Han characters, words by case, numbers of three digits, signs, and white space.
PATTERN: Final = "|".join((
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))
_NAMED: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_folder(model: Path | str, revision: str | None = None) -> Path | None:
    """Where the tokenizer of a model whose own is Kimi's code can be read; None for any other model. Of a hub model
    only files that are here already are looked at.

    Raises:
        UsageError: it is code of another kind.
    """
    file = _local_file(model, revision, FILE)
    if file is None or _local_file(model, revision, "tokenizer.json") is not None:
        return None
    config = _config(file.parent)
    if config.get("tokenizer_class") != CLASS:
        raise UsageError(f"the tokenizer of {model} is a Python file of class {config.get('tokenizer_class')}, which "
                         "is not run; save it as tokenizer.json and give that folder as the target")
    folder = cache_folder().parent / "tokenizers" / _identity(file)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            made = Path(scratch, "tokenizer")
            _converted(file, config).save_pretrained(made)
            try:
                made.rename(folder)
            except OSError:
                # Another process finished first; its folder is as good as ours.
                if not folder.exists():
                    raise
    return folder


def _identity(file: Path) -> str:
    """A hash of all that the result is made of."""
    digest = hashlib.sha256(PATTERN.encode())
    for path in (file, file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def download_tokenizer(model: Path | str, revision: str | None) -> bool:
    """Bring what `tokenizer_folder` looks for; False when the model is a folder, or has no such file."""
    if Path(model).is_dir():
        return False
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(os.fspath(model), revision=revision, allow_patterns=[FILE, "*.jinja", "*_config.json"])
    except OSError:
        return False
    return _local_file(model, revision, FILE) is not None


def _converted(file: Path, config: dict[str, Any]) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    with open(file, "rb") as lines:
        first = sum(1 for line in lines if line.strip())
    added = {int(number): str(token["content"]) for number, token in config.get("added_tokens_decoder", {}).items()}
    special = [added.get(i, f"<|reserved_token_{i}|>") for i in range(first, max(added, default=first - 1) + 1)]
    tokenizer = TikTokenConverter(vocab_file=str(file), pattern=PATTERN, extra_special_tokens=special).converted()
    named = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
    template = file.with_name("chat_template.jinja")
    text = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=text, clean_up_tokenization_spaces=False,
                                   **named)


def _content(token: object) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'tokenizer_config.json'} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _local_file(model: Path | str, revision: str | None, name: str) -> Path | None:
    """A file of a folder, or of a hub model that is in the cache."""
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(os.fspath(model), name, revision=revision)
    return Path(found) if isinstance(found, str) else None
