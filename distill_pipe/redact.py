"""Secrets that other people's error messages quote: tokens, keys, signed URLs. Whatever we print or store of such a
message goes through here first.

A pattern finds what has a known form; the values of variables that hold secrets are known as well, and are taken out
wherever they stand. The trade-off: a secret of unknown form that is in no such variable stays.
"""

import os
import re

MASK = "[redacted]"
_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{10,}|\bHFAK[A-Za-z0-9]{8,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?i:(?<=x-amz-signature=)|(?<=x-amz-security-token=)|(?<=x-amz-credential=)|(?<=x-goog-signature=)|(?<=[?&]sig=)"
    r"|(?<=authorization: )(?:bearer |basic )?|(?<=authorization: bearer ))[^\s&\"'<>,;)]+")
_NAMES = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8


def redacted(text: str) -> str:
    """The text without secrets."""
    for value in _secret_values():
        text = text.replace(value, MASK)
    return _FORMS.sub(MASK, text)


def _secret_values() -> list[str]:
    """Values of variables whose names say that they are secret, the longest first; short ones would hit innocent text,
    and those that name a file are no secret."""
    values = {value for name, value in os.environ.items()
              if _NAMES.search(name) and len(value) >= _SHORTEST and not os.path.exists(value)}
    return sorted(values, key=len, reverse=True)
