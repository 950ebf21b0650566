"""The parts of gpu_check.py that measure PyTorch on the same card."""

import importlib.util
import pathlib
import tempfile
import time

import gpu_parts
import jax
import numpy as np

LEAST_COSINE = 0.99  # of the same text, in bfloat16


def torch_here():
    """PyTorch and the name of its device, if that is JAX's."""
    if importlib.util.find_spec("torch") is None:
        raise gpu_parts.Skipped("torch is not installed: pip install -e .[pytorch]")
    import torch

    if jax.devices()[0].platform != "gpu":
        return torch, "cpu"
    if not torch.cuda.is_available():
        raise gpu_parts.Skipped(f"torch {torch.__version__} sees no GPU")
    return torch, "cuda"


def wait_for(torch, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def grouped_product(sizes, rows):
    """Two products of an expert layer, forward and backward, rows sorted by expert already."""
    torch, device = torch_here()
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is None:
        raise gpu_parts.Skipped(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    peak = gpu_parts.measured(rows, gpu_parts.PRODUCTS)
    for tokens in sizes.tokens:
        options = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
        x = torch.randn(2 * tokens, sizes.width, **options)
        w_in = torch.randn(8, sizes.width, sizes.ffn_width, **options)
        w_out = torch.randn(8, sizes.ffn_width, sizes.width, **options)
        ends = torch.arange(1, 9, device=device, dtype=torch.int32) * (2 * tokens // 8)
        # Not of `sum`: it is one number that is repeated, and the product refuses such strides.
        gradient = torch.randn_like(x)

        def call(x=x, w_in=w_in, w_out=w_out, ends=ends, gradient=gradient):
            hidden = torch.nn.functional.gelu(grouped_mm(x, w_in, offs=ends))
            grouped_mm(hidden, w_out, offs=ends).backward(gradient)

        for _ in range(3):
            call()
        wait_for(torch, device)
        start = time.perf_counter()
        for _ in range(sizes.calls):
            call()
        wait_for(torch, device)
        seconds = (time.perf_counter() - start) / sizes.calls
        ideal = 3 * 2 * 2 * tokens * 2 * sizes.width * sizes.ffn_width
        note = gpu_parts.share(ideal / seconds / 1e12, peak, "the measured products")
        name = f"grouped_mm, {tokens} tokens"
        yield {"name": name, "value": seconds * 1e3, "unit": "ms", "note": note}
    torch.cuda.empty_cache()  # JAX needs memory of the same card


def sentence_transformers(sizes, rows):
    """The same texts and weights as `gpu_parts.encoding`, by the exported folder."""
    torch, device = torch_here()
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
            device=device,
            model_kwargs={"dtype": getattr(torch, sizes.dtype)},
        )
        tokens = sum(len(ids) for ids in embedder.tokenize(texts, "document"))
        ours = embedder.encode(texts[:32], "document")
        theirs = model.encode(texts[:32], prompt_name="document", normalize_embeddings=True)
        cosine = float(np.min(np.sum(ours * theirs, axis=1)))
        row = {"name": "least cosine of the two", "value": cosine, "unit": ""}
        yield row if cosine > LEAST_COSINE else row | {"error": "the two models differ"}
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

    torch.cuda.empty_cache()


PARTS = {"torch experts": grouped_product, "torch encoding": sentence_transformers}
