"""Train sparse Mixture-of-Experts text embedding models on TPUs, in JAX."""

__version__ = "0.1.0"


def __getattr__(name):
    # Lazy, so that `import moe_embed_jax.data...` in a preparation worker does not start JAX.
    if name == "Embedder":
        from moe_embed_jax.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
