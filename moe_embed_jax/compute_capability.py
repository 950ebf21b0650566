"""The compute capability of NVIDIA GPUs by their names. Imports no jax."""

# By a word of the name ("NVIDIA A100-SXM4-80GB"): all that is known of GPUs that are elsewhere.
CAPABILITIES = {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
    "A10": (8, 6),
    "A10G": (8, 6),
    "L4": (8, 9),
    "L40S": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "B200": (10, 0),
}


def capability_of_name(kind: str) -> tuple[int, int] | None:
    """(major, minor) of a GPU with the name `kind`; None for names that are not known."""
    words = kind.replace("-", " ").split()
    return next((CAPABILITIES[word] for word in words[1:] if word in CAPABILITIES), None)
