"""The interfaces of text-embeddings-inference, vLLM and llama-server, answered by our model."""

import contextlib
import http.server
import json
import threading

import numpy as np


@contextlib.contextmanager
def serving(embedder, change=lambda vector: vector, refuse=()):
    """The address of a server whose vectors are `change`d; it refuses the texts of `refuse`."""

    def ids_of(text):
        return [int(x) for x in embedder.tokenize([text], None)[0]]

    def vector_of(text):
        if text in refuse:
            raise ValueError("input is too large")
        return np.float64(change(embedder.encode([text], None)[0])).tolist()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            answers = {
                "/info": {"version": "1.9.9", "model_dtype": "float32"},
                "/version": {"version": "0.33.0"},
                "/props": {"build_info": "b9999"},
                "/v1/models": {"data": [{"id": "ours"}]},
            }
            self._send(200, answers[self.path])

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self._send(200, self._answer(body))
            except ValueError as error:
                self._send(413, {"error": str(error)})

        def _answer(self, body):
            if self.path == "/embed":
                assert body["normalize"] and body["truncate"]
                return [vector_of(text) for text in body["inputs"]]
            if self.path == "/v1/embeddings":
                assert body["model"] == "ours"
                return {"data": [{"embedding": vector_of(text)} for text in body["input"]]}
            if "inputs" in body:
                return [[{"id": i} for i in ids_of(text)] for text in body["inputs"]]
            return {"tokens": ids_of(body["prompt"] if "prompt" in body else body["content"])}

        def _send(self, status, answer):
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
