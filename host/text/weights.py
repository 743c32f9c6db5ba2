"""What a pasted prompt says, for fields that take words and no weights."""

from __future__ import annotations

import re

from comfy.sd1_clip import escape_important, token_weights, unescape_important

_ALTERNATIVES = r"\{[^{}]*\|[^{}]*\}"


def without_weights(text: str) -> str:
    """The words that a prompt says, as the host reads it: without weights, their brackets, and escapes of brackets.

    Raises:
        ValueError: the text has alternatives.
    """
    if found := re.search(_ALTERNATIVES, text):
        raise ValueError(
            f"'{text}' has alternatives, '{found[0]}', and only a prompt that is drawn chooses from them; write each "
            "in an entry of its own."
        )
    return "".join(unescape_important(words) for words, _ in token_weights(escape_important(text), 1.0))
