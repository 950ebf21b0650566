"""Servers of embeddings, asked over HTTP: text-embeddings-inference, vLLM, llama-server.

None of them adds a prefix, so texts are sent with theirs.
"""

import json
import statistics
import time
import urllib.error
import urllib.request

import numpy as np

from moe_embed_jax.interop.verify.compare import Result
from moe_embed_jax.interop.verify.golden import LONG, Golden
from moe_embed_jax.interop.verify.runtimes import Failed

_SECONDS = 300


class Refused(Exception):
    """A server's answer that is an error of the request."""


def _ask(url: str, path: str, body: dict | None = None):
    """The JSON that a server answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url.rstrip("/") + path, data, {"Content-Type": "application/json"}
    )
    # A server of one's own is not behind the proxy of the environment.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_SECONDS) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())
        raise Refused(f"HTTP {error.code} {said:.160}") from None
    except (OSError, ValueError) as error:
        raise Failed(f"{url} does not answer: {getattr(error, 'reason', error)}") from None


class TextEmbeddingsInference:
    def __init__(self, url: str):
        self._url = url
        info = _ask(url, "/info")
        self.version = f"{info['version']}, {info.get('model_dtype', '?')}"

    def embed(self, text: str):
        body = {"inputs": [text], "normalize": True, "truncate": True}
        return _ask(self._url, "/embed", body)[0]

    def tokenize(self, text: str):
        body = {"inputs": [text], "add_special_tokens": True}
        return [token["id"] for token in _ask(self._url, "/tokenize", body)[0]]


class OpenAI:
    """`/v1/embeddings`, as vLLM and llama-server have it."""

    def __init__(self, url: str):
        self._url = url
        self._model = _ask(url, "/v1/models")["data"][0]["id"]
        self.version = self._version()

    def embed(self, text: str):
        body = {"model": self._model, "input": [text], "encoding_format": "float"} | self.options
        return _ask(self._url, "/v1/embeddings", body)["data"][0]["embedding"]


class Vllm(OpenAI):
    options = {"truncate_prompt_tokens": -1}  # noqa: RUF012  at the model's length

    def _version(self):
        return _ask(self._url, "/version")["version"]

    def tokenize(self, text: str):
        body = {"model": self._model, "prompt": text, "add_special_tokens": True}
        return _ask(self._url, "/tokenize", body)["tokens"]


class LlamaServer(OpenAI):
    options = {}  # noqa: RUF012

    def _version(self):
        return str(_ask(self._url, "/props").get("build_info", "?"))

    def tokenize(self, text: str):
        body = {"content": text, "add_special": True}
        return _ask(self._url, "/tokenize", body)["tokens"]


SERVERS = {
    "text-embeddings-inference": TextEmbeddingsInference,
    "vllm": Vllm,
    "llama-server": LlamaServer,
}


def answer_of_server(name: str, url: str, texts: list[Golden], prefixed: list[str], ours) -> Result:
    """What a server makes of the texts.

    Args:
      name: of SERVERS.
      ours: the `Result` of the reference, whose ids stand for those of the long text: a server's
        tokenizer does not cut.

    Raises `Failed`: it does not answer, or not as such a server does.
    """
    try:
        server = SERVERS[name](url)
        vectors, ids, ms, refused = [], [], [], {}
        for i, text in enumerate(prefixed):
            start = time.perf_counter()
            try:
                vectors.append(server.embed(text))
            except Refused as error:
                refused[i] = str(error)
                vectors.append(None)
            ms.append(1e3 * (time.perf_counter() - start))
            ids.append(ours.ids[i] if texts[i].name == LONG else server.tokenize(text))
    except (Refused, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, Refused) else f"{type(error).__name__} {error}"
        raise Failed(f"{url} does not answer as {name} does: {reason}") from None
    width = ours.vectors.shape[1]
    rows = [[np.nan] * width if row is None else row for row in vectors]
    if len({len(row) for row in rows}) > 1:
        raise Failed(f"{url} gives vectors of different widths")
    return Result(server.version, ids, np.array(rows, np.float32), statistics.median(ms), refused)
