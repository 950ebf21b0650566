"""The parts of gpu_check.py that measure PyTorch on the same card."""

import importlib.util
import pathlib
import tempfile
import time

import gpu_parts
import jax
import numpy as np


def cuda_torch():
    """PyTorch, if it can use the card of JAX."""
    if jax.devices()[0].platform != "gpu":
        raise gpu_parts.Skipped("JAX sees no GPU")
    if importlib.util.find_spec("torch") is None:
        raise gpu_parts.Skipped("torch is not installed: pip install -e .[pytorch]")
    import torch

    if not torch.cuda.is_available():
        raise gpu_parts.Skipped(f"torch {torch.__version__} sees no GPU")
    return torch


def grouped_product(sizes, rows):
    """Two products of an expert layer, forward and backward, rows sorted by expert already."""
    torch = cuda_torch()
    if not hasattr(torch, "_grouped_mm"):
        raise gpu_parts.Skipped(f"torch {torch.__version__} has no torch._grouped_mm")
    peak = gpu_parts.measured(rows, gpu_parts.PRODUCTS)
    for tokens in sizes.tokens:
        options = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
        x = torch.randn(2 * tokens, sizes.width, **options)
        w_in = torch.randn(8, sizes.width, sizes.ffn_width, **options)
        w_out = torch.randn(8, sizes.ffn_width, sizes.width, **options)
        ends = torch.arange(1, 9, device="cuda", dtype=torch.int32) * (2 * tokens // 8)

        def call(x=x, w_in=w_in, w_out=w_out, ends=ends):
            hidden = torch.nn.functional.gelu(torch._grouped_mm(x, w_in, offs=ends))
            torch._grouped_mm(hidden, w_out, offs=ends).sum().backward()

        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(sizes.calls):
            call()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / sizes.calls
        ideal = 3 * 2 * 2 * tokens * 2 * sizes.width * sizes.ffn_width
        note = gpu_parts.share(ideal / seconds / 1e12, peak, "the measured products")
        name = f"torch._grouped_mm, {tokens} tokens"
        yield {"name": name, "value": seconds * 1e3, "unit": "ms", "note": note}


def sentence_transformers(sizes, rows):
    """The same texts and weights as `gpu_parts.encoding`, by the exported folder."""
    torch = cuda_torch()
    if importlib.util.find_spec("sentence_transformers") is None:
        raise gpu_parts.Skipped("sentence-transformers is not installed: pip install -e .[pytorch]")
    from sentence_transformers import SentenceTransformer

    from moe_embed_jax import Embedder
    from moe_embed_jax.conversion import export_model

    texts, _ = gpu_parts.texts_of(sizes)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        folder = pathlib.Path(name)
        gpu_parts.save_encoder(sizes, folder)
        embedder = Embedder.load(folder / "ours")
        export_model(folder / "ours", folder / "exported")
        model = SentenceTransformer(
            str(folder / "exported"),
            trust_remote_code=True,
            device="cuda",
            model_kwargs={"torch_dtype": torch.bfloat16},
        )
        tokens = sum(len(ids) for ids in embedder.tokenize(texts, "document"))
        ours = embedder.encode(texts[:32], "document")
        theirs = model.encode(texts[:32], prompt_name="document", normalize_embeddings=True)
        cosine = float(np.min(np.sum(ours * theirs, axis=1)))
        yield {"name": "least cosine of the two", "value": cosine, "unit": ""}
        for batch_size in (32, 256):
            encode = dict(prompt_name="document", batch_size=batch_size)
            model.encode(texts[: 2 * batch_size], **encode)
            start = time.perf_counter()
            model.encode(texts, **encode)
            seconds = time.perf_counter() - start
            yield {
                "name": f"sentence-transformers, batches of {batch_size}",
                "value": tokens / seconds,
                "unit": "tokens/s",
            }


PARTS = {"torch experts": grouped_product, "torch encoding": sentence_transformers}
