"""The child's side of a measurement: `python -m ming_app.bench.worker PEER`, spoken to by peers.py.

Lines of JSON: the setup comes in, {"ready": true} goes out; then each measure by name comes in and {"value": figure}
goes out; a failure is {"error": {"en", "zh"}}. Whatever libraries print goes to stderr. Rates are tokens per second.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ming_app.bench.exam import exam_peer
from ming_app.bench.fidelity import fidelity_peer
from ming_app.bench.peers import Setup, peak_rss
from ming_app.bench.safety import safety_peer
from ming_app.bench.serving import engine_peer, sized_messages
from ming_app.errors import MingError

if TYPE_CHECKING:
    from ming_app.engine.prompt import ChatTokenizer
    from ming_app.models.fetch import LocalModel


def llama_peer(setup: Setup) -> Callable[[str], float]:
    """llama.cpp on the same GGUF, which cannot carry the adapter: greedy, same prompt ids, same threads."""
    from llama_cpp import Llama

    local, tokenizer = _local(setup)
    if local.base.is_dir():
        raise MingError(
            "llama.cpp needs a GGUF file; this base is a folder.", "llama.cpp 需要 GGUF 文件，而该基座是文件夹。"
        )
    threads = setup.settings.threads
    llama = Llama(
        str(local.base), n_ctx=setup.settings.context, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def measure(what: str) -> float:
        name, _, context = what.partition(":")
        if name == "chat-rss":
            return float(peak_rss())
        llama.reset()
        if name == "prefill":
            _, ids = sized_messages(tokenizer, setup.prefill_tokens)
            begin = time.monotonic()
            llama.eval(ids)
            llama.sample(temp=0.0)  # asks for the logits, so that the work is done when the clock is read
            return len(ids) / (time.monotonic() - begin)
        _, ids = sized_messages(tokenizer, int(context or setup.prompt_tokens))
        times = []
        for _ in llama.generate(ids, temp=0.0, repeat_penalty=1.05):
            times.append(time.monotonic())
            if len(times) == setup.tokens:
                break
        return _rate(times)

    return measure


def generate_peer(setup: Setup) -> Callable[[str], float]:
    """transformers' own generate() in bfloat16 with the same adapter injected; greedy."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation import BaseStreamer

    from ming_app.models.load import load_torch_model
    from ming_app.molora.checkpoint import load_adapter

    torch.set_num_threads(setup.settings.threads)
    local, tokenizer = _local(setup)
    adapter = load_adapter(local.adapter, base_fingerprint=local.fingerprint).padded() if local.adapter else None
    model: Any = load_torch_model(local, adapter, "bf16").model
    _, ids = sized_messages(tokenizer, setup.prompt_tokens)

    class Clock(BaseStreamer):
        """Notes when each token comes; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.monotonic())

        def end(self) -> None:
            pass

    config = GenerationConfig(max_new_tokens=setup.tokens, do_sample=False, repetition_penalty=1.05, eos_token_id=None)

    def measure(what: str) -> float:
        clock = Clock()
        with torch.inference_mode():
            tensor = torch.tensor([ids])
            model.generate(tensor, attention_mask=torch.ones_like(tensor), generation_config=config, streamer=clock)
        return _rate(clock.times[1:])

    return measure


PEERS = {
    "engine": engine_peer,
    "engine-base": lambda setup: engine_peer(replace(setup, settings=setup.settings.with_(adapter="none"))),
    "llama": llama_peer,
    "generate": generate_peer,
    "exam": exam_peer,
    "safety": safety_peer,
    "fidelity": fidelity_peer,
    "fidelity-base": lambda setup: fidelity_peer(replace(setup, settings=setup.settings.with_(adapter="none"))),
}


def _rate(times: list[float]) -> float:
    """Tokens per second after the first."""
    return (len(times) - 1) / (times[-1] - times[0])


def _local(setup: Setup) -> tuple[LocalModel, ChatTokenizer]:
    from ming_app.engine.prompt import ChatTokenizer
    from ming_app.models.catalog import find_model
    from ming_app.models.fetch import fetch

    local = fetch(find_model(setup.settings.model), setup.settings)
    return local, ChatTokenizer.from_folder(local.home)


def main() -> int:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # from here on whatever prints to stdout, C libraries too, reaches stderr

    def reply(values: dict[str, Any]) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    try:
        measure = PEERS[sys.argv[1]](Setup.from_json(sys.stdin.readline()))
        reply({"ready": True})
        for line in sys.stdin:
            reply({"value": measure(json.loads(line))})
    except MingError as error:
        reply({"error": {"en": error.en, "zh": error.zh}})
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
