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

from ming_app.answering import answer
from ming_app.bench.exam import exam_peer
from ming_app.bench.fidelity import fidelity_peer
from ming_app.bench.peers import Setup
from ming_app.bench.safety import safety_peer
from ming_app.console import Console
from ming_app.engine.types import Message, SamplingParams
from ming_app.errors import MingError

if TYPE_CHECKING:
    from ming_app.engine.prompt import ChatTokenizer
    from ming_app.models.fetch import LocalModel

QUESTION = (
    "Explain step by step how blood pressure is measured at home, what the two numbers mean and when to see a doctor. "
    "请说明居家测量血压的步骤、两个数值的含义，以及何时需要就医。"
)
CHAT = ("发烧三天，伴有咳嗽，应该注意什么？", "Which foods are rich in iron?", "和前面的问题相比，哪个更紧急？")
CHAT_TOKENS = 128


def sized_messages(tokenizer: ChatTokenizer, tokens: int) -> tuple[list[Message], list[int]]:
    """A question cut to a prompt of at most `tokens` tokens (and at least the frame of a turn), and its ids."""
    ids = tokenizer.encode_text(QUESTION)
    filler = (QUESTION * (tokens // len(ids) + 2)).strip()
    low, high = 1, len(filler)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_prompt(tokenizer, filler[:middle])) <= tokens else (low, middle - 1)
    return [Message("user", filler[:low])], _prompt(tokenizer, filler[:low])


def _prompt(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return tokenizer.build([Message("user", text)], 1 << 20, 1).ids


def engine_peer(setup: Setup) -> Callable[[str], float]:
    """Our engine, by way of its public stream; greedy, and running past end tokens so that lengths are equal."""
    from ming_app.engine.engine import Engine

    engine = Engine.load(setup.settings, Console(setup.settings.message_lang()).progress)
    stop_ids = engine.tokenizer.stop_ids
    decode_messages, _ = sized_messages(engine.tokenizer, setup.prompt_tokens)
    prefill_messages, _ = sized_messages(engine.tokenizer, setup.prefill_tokens)

    def run(messages: list[Message], tokens: int, trace: bool) -> Any:
        engine.tokenizer.stop_ids = frozenset()
        try:
            return answer(engine, messages, SamplingParams(max_new_tokens=tokens, temperature=0.0, trace=trace)).finish
        finally:
            engine.tokenizer.stop_ids = stop_ids

    def measure(what: str) -> float:
        if what == "prefill":
            finish = run(prefill_messages, 1, True)
            return float(finish.prompt_tokens / finish.timings.prefill_seconds)
        if what == "rss":
            history: list[Message] = []
            for text in CHAT:
                history.append(Message("user", text))
                reply = answer(engine, history, SamplingParams(max_new_tokens=CHAT_TOKENS, seed=0))
                history.append(Message("assistant", reply.text))
            return float(peak_rss())
        return float(run(decode_messages, setup.tokens, what == "decode").timings.tokens_per_second)

    return measure


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
    _, decode_ids = sized_messages(tokenizer, setup.prompt_tokens)
    _, prefill_ids = sized_messages(tokenizer, setup.prefill_tokens)

    def measure(what: str) -> float:
        llama.reset()
        if what == "prefill":
            begin = time.monotonic()
            llama.eval(prefill_ids)
            llama.sample(temp=0.0)  # asks for the logits, so that the work is done when the clock is read
            return len(prefill_ids) / (time.monotonic() - begin)
        times = []
        for _ in llama.generate(decode_ids, temp=0.0, repeat_penalty=1.05):
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
}


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:  # Linux: VmHWM is this program's own; ru_maxrss would count the parent's memory at the fork
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))  # elsewhere: Windows keeps a peak, others the present size


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
