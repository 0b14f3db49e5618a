"""Characters of Chinese and Japanese texts: which are words by themselves, and which are wide forms of others."""

import unicodedata

# For a class of a regular expression.
HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


def narrow(text: str) -> str:
    """Full-width letters, digits and signs as those of ASCII. All else stays: a raised 2 is no digit of the number before it."""
    return "".join(unicodedata.normalize("NFKC", char) if "！" <= char <= "～" else char for char in text)
