"""When two texts are duplicates, in preparation, filtering and mining alike."""

import unicodedata


def normal_form(text: str) -> str:
    """Two texts with the same one are duplicates: NFKC, case folded, runs of white space as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
