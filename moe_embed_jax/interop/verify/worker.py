"""Embeds texts by one runtime in a process of its own: a script, whose Python may be another one.

    python worker.py < REQUEST

Imports nothing of this package. REQUEST is JSON: "runtime", "folder" (an exported one), "texts"
(with their prefixes), "raw" and "prompts" (the same without, and their names), "max_length",
"pooling" and "file" (of ONNX). The last line of the output begins with RESULT and is JSON:
"version", "ids", "vectors", "ms", "refused", or "missing" with the reason.
"""

import importlib.metadata
import json
import os
import statistics
import sys
import time

RESULT = "verify-result "
BATCH = 8  # so that most texts are padded
TIMED = 10  # texts, one at a time


def batches(count):
    """Lists of places; the last text, which is long, is alone."""
    places = list(range(count - 1))
    return [places[i : i + BATCH] for i in range(0, len(places), BATCH)] + [[count - 1]]


def run(encode, tokenize, request, texts, version):
    """The answer, from encode(texts, places) -> [n][D] and tokenize(text) -> ids or None."""
    vectors, ms = [], []
    for places in batches(len(texts)):
        rows = encode([texts[i] for i in places], places)
        vectors += [[float(x) for x in row] for row in rows]
    for i in range(TIMED):
        start = time.perf_counter()
        encode([texts[i]], [i])
        ms.append(1e3 * (time.perf_counter() - start))
    ids = None if tokenize is None else [[int(x) for x in tokenize(text)] for text in texts]
    return {
        "version": version,
        "ids": ids,
        "vectors": vectors,
        "ms": statistics.median(ms),
        "refused": {},
    }


def pooled(states, mask, pooling):
    """Unit vectors [B, D] of states [B, L, D] and mask [B, L]."""
    import numpy as np

    mask = np.asarray(mask, np.float32)[..., None]
    if pooling == "mean":
        x = (states * mask).sum(1) / mask.sum(1)
    else:
        last = mask.shape[1] - 1 - mask[:, ::-1, 0].argmax(1)
        place = mask[..., 0].argmax(1) if pooling == "cls" else last
        x = states[np.arange(len(states)), place]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def of_transformers(request):
    import torch
    import transformers

    folder, trust = request["folder"], {"trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **trust).eval()

    def encode(texts, places):
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch)[0].numpy()
        return pooled(states, batch["attention_mask"].numpy(), request["pooling"])

    def tokenize(text):
        return tokenizer(text, truncation=True)["input_ids"]

    return run(encode, tokenize, request, request["texts"], transformers.__version__)


def of_sentence_transformers(request, **options):
    import sentence_transformers
    import transformers

    model = sentence_transformers.SentenceTransformer(
        request["folder"], trust_remote_code=True, device="cpu", **options
    )

    def encode(texts, places):
        rows = [None] * len(texts)
        for name in dict.fromkeys(request["prompts"]):
            own = [i for i, place in enumerate(places) if request["prompts"][place] == name]
            found = model.encode([texts[i] for i in own], prompt_name=name) if own else []
            for i, row in zip(own, found, strict=True):
                rows[i] = row
        return rows

    ids = [
        model.tokenizer(text, truncation=True, max_length=model.max_seq_length)["input_ids"]
        for text in request["texts"]
    ]
    version = f"{sentence_transformers.__version__} on transformers {transformers.__version__}"
    answer = run(encode, None, request, request["raw"], version)
    return answer | {"ids": [[int(x) for x in row] for row in ids]}


def of_sentence_transformers_onnx(request):
    import optimum.onnxruntime  # noqa: F401  the library's own message does not say what is wrong

    options = {"backend": "onnx", "model_kwargs": {"file_name": request["file"]}}
    return of_sentence_transformers(request, **options)


def tokenizer_of(request):
    """The tokenizers library's, padding and cutting as the folder says."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(request["folder"], "tokenizer.json"))
    tokenizer.enable_truncation(request["max_length"])
    tokenizer.enable_padding(pad_id=1)
    return tokenizer


def run_onnx(request, states, version):
    """`states`: of ids and mask, int64 [B, L]."""
    import numpy as np

    tokenizer = tokenizer_of(request)

    def encode(texts, places):
        batch = tokenizer.encode_batch(texts)
        ids = np.array([each.ids for each in batch], np.int64)
        mask = np.array([each.attention_mask for each in batch], np.int64)
        return pooled(states(ids, mask), mask, request["pooling"])

    def tokenize(text):
        return tokenizer.encode(text).ids

    return run(encode, tokenize, request, request["texts"], version)


def of_onnxruntime(request):
    import onnxruntime

    path = os.path.join(request["folder"], request["file"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def states(ids, mask):
        return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    return run_onnx(request, states, onnxruntime.__version__)


def of_openvino(request):
    import openvino

    # Where the processor has bfloat16, OpenVINO computes in it unless it is told not to.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    path = os.path.join(request["folder"], request["file"])
    model = openvino.Core().compile_model(path, "CPU", options)

    def states(ids, mask):
        return model({"input_ids": ids, "attention_mask": mask})[0]

    version = importlib.metadata.version("openvino")
    return run_onnx(request, states, version)


def of_fastembed(request):
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    poolings = {"mean": "MEAN", "cls": "CLS", "last": "LAST_TOKEN"}
    TextEmbedding.add_custom_model(
        model="verified/model",
        pooling=PoolingType[poolings[request["pooling"]]],
        normalization=True,
        sources=ModelSource(hf="verified/model"),
        dim=request["width"],
        model_file=request["file"],
    )
    model = TextEmbedding("verified/model", specific_model_path=request["folder"])

    def encode(texts, places):
        return list(model.embed(texts))

    def tokenize(text):
        return model.model.tokenize([text])[0].ids

    version = importlib.metadata.version("fastembed")
    return run(encode, tokenize, request, request["texts"], version)


RUNTIMES = {
    "transformers": of_transformers,
    "sentence-transformers": of_sentence_transformers,
    "sentence-transformers-onnx": of_sentence_transformers_onnx,
    "onnxruntime": of_onnxruntime,
    "onnxruntime-int8": of_onnxruntime,
    "openvino": of_openvino,
    "fastembed": of_fastembed,
}


def main():
    request = json.load(sys.stdin)
    try:
        answer = RUNTIMES[request["runtime"]](request)
    except ImportError as error:
        answer = {"missing": str(error).splitlines()[0]}
    print(f"\n{RESULT}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
