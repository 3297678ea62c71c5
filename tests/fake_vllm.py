"""A small stand-in for `vllm serve`, with the parts of its HTTP contract that we use, and with faults on demand.

It samples from our own network, so that the checks against the trainer's log-probs hold, and it forgets its adapters when
it is restarted, as vLLM does. What it must get right is compared with a real vLLM in test_vllm.py.
"""

import copy
import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from lora import load_adapter, read_adapter
from policy import ChatTokenizer, draw, sampling_logprobs, uniform
from qwen3 import KVCache, Qwen3


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Settings:
    """How the server was started; the defaults are right."""

    max_model_len: int = 512
    max_lora_rank: int = 64
    enable_lora: bool = True
    runtime_loading: bool = True
    processed_logprobs: bool = True
    shift_ids: int = 0                               # another tokenizer than ours
    scale: float = 1.0                               # other weights than ours
    sleep_mode: bool = True                          # --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1


@dataclass
class FakeVLLM:
    model: Qwen3                                     # base weights only
    tokenizer: ChatTokenizer
    settings: Settings = field(default_factory=Settings)
    faults: list = field(default_factory=list)       # one is used up by each POST /v1/completions; see Handler.fault
    requests: list[dict] = field(default_factory=list)           # bodies of /v1/completions
    events: list[tuple] = field(default_factory=list)            # ("load" | "unload", name, path, did the path exist?)
    adapters: dict[str, tuple[Path, Qwen3]] = field(default_factory=dict)
    opened: threading.Event = field(default_factory=threading.Event)     # what "hang" waits for
    asleep: bool = False
    port: int = 0
    sockets: set = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        handler = type("Bound", (Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.port = self.http.server_port
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def kill(self) -> None:
        """As SIGKILL: connections are reset, adapters are forgotten."""
        self.http.shutdown()
        self.http.server_close()
        self.adapters = {}
        for connection in list(self.sockets):
            drop(connection)
        self.thread.join()

    def sleep(self, asleep: bool) -> None:
        if not self.settings.sleep_mode:
            raise Refusal(404, "Not Found")
        self.asleep = asleep

    def complete(self, body: dict) -> dict:
        if self.asleep:
            raise Refusal(500, "the engine sleeps")
        if body["model"] != "tiny" and body["model"] not in self.adapters:
            raise Refusal(404, f"The model `{body['model']}` does not exist. Valid aliases: tiny.")
        model = self.adapters[body["model"]][1] if body["model"] in self.adapters else self.model
        prompt, room = body["prompt"], min(body["max_tokens"], self.settings.max_model_len - len(body["prompt"]))
        if room < 1:
            raise Refusal(400, f"This model's maximum context length is {self.settings.max_model_len} tokens.")
        ids, logprobs = list(prompt), []
        limit = min(map(int, body["logit_bias"]), default=None)
        distribution = (body["temperature"], body["top_p"], body["top_k"], limit)
        cache, seen = KVCache(model.config, 1, len(prompt) + room), 0
        while len(logprobs) < room and (not logprobs or ids[-1] not in body["stop_token_ids"]):
            with torch.no_grad():
                new = model.hidden(torch.tensor([ids[seen:]]), torch.arange(seen, len(ids))[None], cache)
                logits, seen = model.head(new[:, -1]) * self.settings.scale, len(ids)
            processed = sampling_logprobs(logits, *distribution)
            token = draw(processed, torch.tensor([uniform(body["seed"], len(ids))], dtype=torch.float64)).item()
            reported = processed if self.settings.processed_logprobs else logits.log_softmax(-1)
            ids.append(token)
            logprobs.append(reported[0, token].item())
        new = ids[len(prompt):]
        return {"choices": [{"token_ids": new, "prompt_token_ids": prompt, "logprobs": {"token_logprobs": logprobs},
                             "finish_reason": "stop" if new[-1] in body["stop_token_ids"] else "length"}]}

    def load(self, name: str | None, path: str | None) -> str:
        if not self.settings.runtime_loading:
            raise Refusal(404, "Not Found")
        if not name or not path:
            raise Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if not self.settings.enable_lora:
            raise Refusal(500, "Call to add_lora method failed: LoRA is not enabled")
        if name in self.adapters:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_model.safetensors").exists():
            raise Refusal(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = read_adapter(path)[0]["r"]
        if rank > self.settings.max_lora_rank:
            raise Refusal(500, f"Call to add_lora method failed: LoRA rank {rank} is greater than max_lora_rank "
                               f"{self.settings.max_lora_rank}.")
        model = copy.deepcopy(self.model)
        load_adapter(model, path)
        self.adapters[name] = Path(path), model
        self.events.append(("load", name, Path(path)))
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> str:
        if name not in self.adapters:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.")
        path, _ = self.adapters.pop(name)
        self.events.append(("unload", name, path, path.exists()))
        return f"Success: LoRA adapter '{name}' removed successfully."

    def models(self) -> dict:
        base = {"id": "tiny", "root": "/models/tiny", "parent": None, "max_model_len": self.settings.max_model_len}
        return {"data": [base, *({"id": name, "root": str(path), "parent": "tiny", "max_model_len": None}
                                 for name, (path, _) in self.adapters.items())]}

    def tokenize(self, text: str) -> dict:
        special = {"<|im_start|>": self.tokenizer.start_id, "<|im_end|>": self.tokenizer.end_id,
                   "<|endoftext|>": self.tokenizer.pad_id}
        ids = [special[text]] if text in special else self.tokenizer.encode(text)
        return {"tokens": [i + self.settings.shift_ids for i in ids]}


def drop(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:                                  # closed already
        return


class Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM
    protocol_version = "HTTP/1.1"                    # connections are kept alive
    timeout = 5

    def setup(self) -> None:
        super().setup()
        self.fake.sockets.add(self.connection)

    def finish(self) -> None:
        self.fake.sockets.discard(self.connection)
        super().finish()

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: bytes, length: int | None = None, headers: Sequence[tuple] = ()) -> None:
        self.send_response(status)
        for header in (("Content-Length", len(content) if length is None else length), *headers):
            self.send_header(header[0], str(header[1]))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def do_GET(self) -> None:
        fixed = {"/health": "", "/version": {"version": "0.32.0"}, "/v1/models": self.fake.models(),
                 "/is_sleeping": {"is_sleeping": self.fake.asleep}}
        value = fixed.get(self.path)
        self.answer(404 if value is None else 200, json.dumps(value).encode() if value else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            if self.path == "/v1/completions":
                self.fake.requests.append(body)
                fault = self.fake.faults.pop(0) if self.fake.faults else None
                return self.fault(fault, self.fake.complete(body) if fault is None or isinstance(fault, str) else {})
            value = {"/sleep?level=1": lambda: self.fake.sleep(True), "/wake_up": lambda: self.fake.sleep(False),
                     "/tokenize": lambda: self.fake.tokenize(body["prompt"]),
                     "/v1/load_lora_adapter": lambda: self.fake.load(body.get("lora_name"), body.get("lora_path")),
                     "/v1/unload_lora_adapter": lambda: self.fake.unload(body["lora_name"])}[self.path]()
            self.answer(200, json.dumps(value).encode())
        except Refusal as refusal:
            self.refuse(refusal.status, str(refusal))

    def refuse(self, status: int, message: str, headers: Sequence[tuple] = ()) -> None:
        self.answer(status, json.dumps({"error": {"message": message, "code": status}}).encode(), headers=headers)

    def fault(self, fault: str | int | tuple | None, good: dict) -> None:
        """Answer /v1/completions: well, with a status, or in one of the ways in which an answer goes wrong."""
        [choice] = good.get("choices", [{}])
        if isinstance(fault, tuple):
            return self.refuse(fault[0], "busy", headers=[("Retry-After", fault[1])])
        if isinstance(fault, int):
            return self.refuse(fault, f"made-up error {fault}")
        if fault == "reset":
            return drop(self.connection)
        if fault == "hang":
            self.fake.opened.wait(20)
            return drop(self.connection)
        if fault == "slow":
            time.sleep(0.3)
        if fault == "no ids":
            choice["token_ids"] = None
        if fault == "no logprobs":
            choice["logprobs"] = None
        if fault == "a missing logprob":
            choice["logprobs"]["token_logprobs"][-1] = None
        if fault == "one logprob less":
            choice["logprobs"]["token_logprobs"].pop()
        if fault == "impossible logprob":
            choice["logprobs"]["token_logprobs"][0] = -9999.0
        if fault == "clipped":
            choice["token_ids"], choice["finish_reason"] = choice["token_ids"][:1], "length"
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:1]
        if fault == "aborted":
            choice["finish_reason"] = "abort"
        if fault == "padding id":
            choice["token_ids"][0] = self.fake.model.config.vocab_size - 1
        if fault == "another prompt":
            choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]
        if fault == "no choices":
            good = {"object": "text_completion"}
        content = json.dumps(good).encode()
        if fault == "truncated":
            self.answer(200, content[:len(content) // 2], length=len(content))
            return drop(self.connection)
        if fault == "invalid json":
            content = b"<html>Bad Gateway</html>"
        self.answer(200, content)
