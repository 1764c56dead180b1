"""Our models in lm-evaluation-harness (package `lm-eval`, an optional extra: requirements-eval.txt).

    python -m training.harness --tasks medical_letters --include_path examples/lm_eval \\
        --model_args model=ming-moe-0.5b [--apply_chat_template]

takes every option of the harness's own command; `model_args` are model, adapter (folder or none) and precision. What is
measured is the engine that serves. The harness joins turns into one string with control tokens spelt out in it; task files
are trusted, so here (and only here) such text becomes control tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tokenizers import Tokenizer

from ming_app.engine.engine import Engine
from ming_app.engine.types import Message
from ming_app.models.catalog import find_model
from ming_app.models.fetch import fetch
from ming_app.settings import Settings
from training.answers import greedy_answers
from training.chat import ChatTokenizer

MAX_NEW_TOKENS = 256


@register_model("ming-moe")
class MingMoE(TemplateLM):
    """`model`: catalogue name, folder or hub id; other arguments of the harness (batch_size, device) change nothing."""

    def __init__(
        self,
        model: str = "ming-moe-1.5b",
        adapter: str | None = None,
        precision: str | None = None,
        **_: Any,
    ):
        super().__init__()
        settings = Settings.load({"model": model, "adapter": adapter, "precision": precision})
        self.engine = Engine.load(settings)
        home = fetch(find_model(model), settings).home
        self.chat = ChatTokenizer.from_folder(home)
        self.marked = Tokenizer.from_file(str(home / "tokenizer.json"))
        self.name = model

    @property
    def eot_token_id(self) -> int:
        """The token that ends a turn."""
        return self.chat.end_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return self.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Names the format; the text itself is made by `apply_chat_template`."""
        return f"{self.chat.format.turn}role{self.chat.format.role_end}" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as one string, control tokens spelt out."""
        ids = self.chat.opening_ids()
        for i, turn in enumerate(chat_history):
            closed = add_generation_prompt or i < len(chat_history) - 1
            ids += self.chat.turn_ids(Message(turn["role"], turn["content"]), closed=closed)
        if add_generation_prompt:
            ids += self.chat.turn_ids(Message("assistant", ""), closed=False)
        return self.chat.decode(ids)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text in which control tokens may be spelt out."""
        return list(self.marked.encode(string, add_special_tokens=False).ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, continuation in requests:
            result = self._score(context, continuation)
            self.cache_hook.add_partial("loglikelihood", texts, result)
            found.append(result)
        return found

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of the continuation, and whether greedy decoding would write it."""
        backend, room = self.engine.backend, len(continuation)
        context = list(context)[-max(1, self.engine.backend.max_context - room) :]
        ids = np.asarray([*context, *continuation][:-1], np.int64)
        logits = np.asarray(backend.forward([ids], backend.new_cache(1, len(ids)), all_logits=True).logits[0])
        logits, targets = logits[-room:].astype(np.float64), np.asarray(continuation)
        top = logits.max(-1)
        total = logits[np.arange(room), targets] - top - np.log(np.exp(logits - top[:, None]).sum(-1))
        return float(total.sum()), bool((logits.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context where they are longer."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.engine.backend.max_context - 1, 1
            )
            pairs = map(utils.make_disjoint_window, windows)
            totals.append(sum(self._score(context, rest)[0] for context, rest in pairs))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut at the first of the `until` strings."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        options = [request.args[1] for request in requests]
        longest = max((int(o.get("max_gen_toks", MAX_NEW_TOKENS)) for o in options), default=MAX_NEW_TOKENS)
        answers = greedy_answers(self.engine.backend, prompts, self.chat.stop_ids, longest)
        texts = []
        for option, answer in zip(options, answers, strict=True):
            text = self.chat.decode(answer.ids[: int(option.get("max_gen_toks", MAX_NEW_TOKENS))])
            until = option.get("until") or []
            for end in [until] if isinstance(until, str) else until:
                text = text.split(end)[0] if end else text
            texts.append(text)
        return texts


def main() -> None:
    """The harness's own command with our model registered."""
    from lm_eval.__main__ import cli_evaluate

    if "--model" not in sys.argv:
        sys.argv[1:1] = ["--model", "ming-moe"]
    cli_evaluate()


if __name__ == "__main__":
    main()
