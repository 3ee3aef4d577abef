"""An OpenAI-compatible endpoint whose models misbehave, each in the way of its name. Prints its port."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

MODELS = (
    "good", "fenced", "limited", "flaky", "hang", "prose", "prose-once", "not-json", "seven", "refusal",
    "rejects", "unauthorized", "one-fails", "drops",
)  # fmt: skip
lock = threading.Lock()
state = {"requests": 0, "under_way": 0, "most_at_once": 0, "last": None}
seen: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": model} for model in MODELS]})
        else:
            self.answer(200, state)
            state["most_at_once"] = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            state["requests"] += 1
            state["under_way"] += 1
            state["most_at_once"] = max(state["most_at_once"], state["under_way"])
            state["last"] = {"body": body, "key": self.headers.get("Authorization")}
            first = (key := json.dumps([body["model"], body["messages"]])) not in seen
            seen.add(key)
        try:
            self.judge(body, first)
        finally:
            with lock:
                state["under_way"] -= 1

    def judge(self, body, first):
        model = body["model"]
        pictures = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
        picture = Image.open(io.BytesIO(base64.b64decode(pictures[-1].partition(",")[2])))
        score = picture.getpixel((0, 0))[0] // 60
        if model == "limited" and first:
            return self.answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.1"})
        if (model == "flaky" and first) or (model == "one-fails" and score == 0):
            return self.answer(500, {"error": {"message": "internal"}})
        if model == "drops" and first:
            return self.connection.close()
        if model == "unauthorized":
            return self.answer(401, {"error": {"message": "bad key"}})
        if model == "rejects" or body.get("response_format", {"type": "json_schema"})["type"] != "json_schema":
            return self.answer(400, {"error": {"message": "json_schema is not supported"}})
        if model == "hang":
            return time.sleep(30)
        if model == "not-json":
            return self.answer(200, "<html>")
        time.sleep(0.05)
        text = json.dumps({"findings": "as asked", "score": 7 if model == "seven" else score})
        if model == "fenced":
            text = f"```json\n{text}\n```"
        if model == "prose" or (model == "prose-once" and first):
            text = "I would give it a 3."
        self.answer(200, {
            "choices": [{"message": {"content": None if model == "refusal" else text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7},
        })  # fmt: skip

    def answer(self, status, body, headers=()):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)  # noqa: T201
    server.serve_forever()
