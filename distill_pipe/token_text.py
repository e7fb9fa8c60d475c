"""Token ids as text, for people who look at a trace; as plain ids where the target's tokenizer cannot be had."""

from collections.abc import Callable

from distill_pipe.errors import UsageError
from distill_pipe.report_tables import say


def token_decoder(target: str) -> Callable[[int], str]:
    """The text of single tokens of a target. It may hold anything that a model can write: escape it before showing."""
    try:
        from distill_pipe.produce.chat import load_tokenizer
        from distill_pipe.produce.targets import resolve_target

        tokenizer = load_tokenizer(resolve_target(target).folder)
    except (UsageError, ImportError) as error:
        say(f"token ids are shown as numbers: {error}")
        return str
    return lambda token: str(tokenizer.decode([token]))
