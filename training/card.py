"""MODEL_CARD.md of a trained adapter, made from its own summary and from what `training evaluate` measured.

Nothing is stated that was not recorded or measured: a figure that is missing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ming_app.models.catalog import HubFile, list_models
from ming_app.molora.checkpoint import Adapter
from training.licences import licence_of

ENDING = """\
## Intended use

Education, research, and practice with exam questions, in Chinese and English, with a person who checks what matters.

## Out of scope

**Not a medical device, not for diagnosis, treatment or triage, not for decisions about any person.** Not for doses,
prescriptions or emergencies. In an emergency call the local emergency number (China 120, EU 112, US 911).

## Limits

A language model of this size states wrong things fluently, in both languages; what it says about doses, contraindications
and emergencies must not be relied on. The amount of training is very small (see above): it teaches the form of medical chat
and exam answers more than medical knowledge. Part of the training text was written by other models (Huatuo, CMtMedQA,
ChatDoctor), with their habits and mistakes. Conversations come from Chinese and US sources; advice follows no single
country's guidelines. Experts are not specialists in a medical field: what they divide among themselves is mostly form,
language and token type.

仅供学习、研究和练习考试题使用，**不是医疗器械，不得用于诊断、治疗、分诊或针对任何人的决定**。训练量很小，回答可能流畅却错误；
紧急情况请立即拨打当地急救电话（中国 120）。
"""

CITATION = """\
## Citation

The architecture is that of MING-MOE; these weights are not the authors'.

```bibtex
@misc{liao2024mingmoe,
  title         = {MING-MOE: Enhancing Medical Multi-Task Learning in Large Language Models with Sparse Mixture of Low-Rank Adapter Experts},
  author        = {Yusheng Liao and Shuyang Jiang and Yu Wang and Yanfeng Wang},
  year          = {2024},
  eprint        = {2404.09027},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL}
}
```
"""


def model_card(name: str, title: str, adapter: Adapter, evaluation: Mapping[str, Any] | None) -> str:
    """Markdown. `title` is the base's human name; `evaluation` is the JSON of `training evaluate`, when there is one."""
    summary = adapter.summary
    parts = [
        _front_matter(str(summary["base"])),
        f"# {name}: sparse MoLoRA adapter for {title}\n",
        _what(title, adapter, str(summary["base"])),
        _data(summary),
        _method(adapter),
        _measured(evaluation) if evaluation else "",
        ENDING,
        _use(name, str(summary["base"])),
        CITATION,
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(base: str) -> str:
    """Metadata as model hubs read it; the base's id where the catalogue knows one."""
    repositories = [
        source.repo
        for model in list_models()
        if model.name == base
        for source in model.sources
        if isinstance(source, HubFile)
    ]
    on_hub = (
        [f"base_model: {repositories[0].removesuffix('-GGUF')}", "base_model_relation: adapter"] if repositories else []
    )
    lines = [
        "---",
        "license: apache-2.0",
        "language: [zh, en]",
        *on_hub,
        "library_name: ming-app",
        "pipeline_tag: text-generation",
        "tags: [medical, molora, mixture-of-experts, lora]",
        "---",
    ]
    return "\n".join(lines) + "\n"


def _use(name: str, base: str) -> str:
    bundled = any(model.name == name for model in list_models())
    flags, settings = f"--model {name}", f'model="{name}"'
    if not bundled:
        flags, settings = f"--model {base} --adapter FOLDER", f'model="{base}", adapter="FOLDER"'
    return f"""\
## How to use

With the program that made it, from its folder; not with PEFT or transformers alone, whose formats hold neither routers nor
experts. `config.json` names the base by its SHA-256, and another base is refused.

    python app.py {flags}
    python -m ming_app ask "What is anaemia?" {flags}

```python
from ming_app.engine.engine import Engine
from ming_app.engine.types import Message, SamplingParams, Token
from ming_app.settings import Settings

engine = Engine.load(Settings({settings}))
for event in engine.stream([Message("user", "What is anaemia?")], SamplingParams()):
    if isinstance(event, Token):
        print(event.text, end="", flush=True)
engine.close()
```
"""


def _what(title: str, adapter: Adapter, base: str) -> str:
    c = adapter.config
    licence = next(
        (f", {model.licence.removesuffix(', Apache-2.0 (adapter)')}" for model in list_models() if model.name == base),
        "",
    )
    numbers = sum(array.size for array in adapter.tensors.values())
    return f"""\
Experts and routers for the method of MING-MOE (arXiv 2404.09027): every FFN projection of every layer carries
E = {c.num_experts} LoRA experts of rank {c.rank} and a router that picks k = {c.top_k} of them per token; the attention projections
({", ".join(c.attention_targets)}) carry ordinary LoRA of the same rank. {numbers / 1e6:.1f} M parameters over {adapter.num_layers} layers, bf16.
The base is frozen. These are weights of this project, not the released MING-MOE weights.

| | |
|---|---|
| base | {title}{licence} |
| SHA-256 of the base file it was trained on | `{adapter.base_fingerprint}` |
| fingerprint of the adapter | `{adapter.fingerprint}` |
"""


_NONE_STATED = "sources whose repository states no licence are left out, among them the MedQA and MedMCQA\nquestions that came through such a repository"
_FILTERED = {
    "any": " (nothing is left out for its licence)",
    "stated": f" ({_NONE_STATED})",
    "open": f" ({_NONE_STATED}; so are those for research only)",
}


def _data(summary: Mapping[str, Any]) -> str:
    rows = [
        "| stream | source | rows | tokens | licence as its repository states it | repository |",
        "|---|---|---:|---:|---|---|",
    ]
    for stream, sources in sorted(summary.get("seen", {}).items()):
        for source, count in sorted(sources.items()):
            stated = summary.get("licences", {}).get(stream, {}).get(source, "")
            part = (
                {} if summary["licence_filter"] == "any" else {"split": "dev"}
            )  # all of a mixed source that it lets through
            licence = licence_of(source, part, stated)
            note = f"{licence.licence}{'; research use' if licence.use == 'research' else ''}"
            rows.append(
                f"| {stream} | {source} | {count['rows']:,} | {count['tokens']:,} | {note} | {licence.origin} |"
            )
    return f"""\
## Trained on

{summary["rows"]:,} conversations, {summary["tokens"]:,} tokens, of which {summary["answer_tokens"]:,} in answers (the loss looks at these only{_repeats(summary)}).
Licence filter: {summary["licence_filter"]}{_FILTERED[summary["licence_filter"]]}. `exam_letter` streams ask for the letter alone, with the options in a new
order each time. Held-out rows, and all dev and benchmark files, were not trained on. Sources marked "research use" add an
"academic or research use only" clause to their licence: respect it when you use these weights.

{chr(10).join(rows)}
"""


def _repeats(summary: Mapping[str, Any]) -> str:
    names = summary.get("repeats", ())
    return f";\nin {', '.join(names)} at the end of answers that were made to repeat themselves" if names else ""


def _method(adapter: Adapter) -> str:
    s, c = adapter.summary, adapter.config
    o, precision = s["optimizer"], f" in {s['precision']}" if "precision" in s else ""
    where = (
        f" on {s['threads']} CPU threads"
        if s.get("device") == "cpu"
        else f" on {s['device']}"
        if s.get("device")
        else ""
    )
    return f"""\
## How

Masked chat loss on assistant turns and their end token; frozen base{precision}, AdamW on float32 adapter weights.

| steps | minutes{where} | peak lr | warm-up | weight decay | clip | balance loss | E, k, r, alpha | seed |
|---:|---:|---:|---:|---:|---:|---:|---|---:|
| {s["steps"]} | {s["active_minutes"]} | {o["lr"]:g} | {o["warmup"]:.0%} | {o["weight_decay"]:g} | {o["clip"]:g} | {s["router"]["balance"]:g} | {c.num_experts}, {c.top_k}, {c.rank}, {c.alpha:g} | {s["seed"]} |

The recipe is `training/recipes/{s["recipe"]}.toml`.
"""


def _measured(evaluation: Mapping[str, Any]) -> str:
    precisions = ", ".join(f"{what} in {precision}" for what, precision in evaluation["precision"].items())
    text = f"## Measured\n\nBase and adapter by the same program in the same precision ({precisions}).\n"
    exams = evaluation.get("exam", {})
    if exams:
        text += """
Letter accuracy by next-token logits on single-answer questions, zero-shot, options in file order, 95 % Wilson interval:

| file | n | base | adapter |
|---|---:|---|---|
"""
        for file, measured in sorted(exams.items()):
            n = next(iter(measured.values()))["n"]
            text += f"| {file} | {n} | {_accuracy(measured.get('base'))} | {_accuracy(measured.get('adapter'))} |\n"
    dev = evaluation.get("dev", {})
    if dev:
        text += (
            "\nLoss per answer token on held-out rows (natural log):\n\n| stream | base | adapter |\n|---|---:|---:|\n"
        )
        losses = {what: values["loss"] for what, values in dev.items()}
        for stream in sorted(next(iter(losses.values()))):
            cells = [f"{losses[what][stream]:.3f}" if what in losses else "" for what in ("base", "adapter")]
            text += f"| {stream} | {cells[0]} | {cells[1]} |\n"
        adapter = dev.get("adapter", {})
        if "smallest_load" in adapter:
            text += (
                f"\nExpert load on those rows (an even share would be {_even(adapter):.0%}): over all routers the least used expert gets"
                f" {adapter['smallest_load']:.1%} of its router's choices, the most used {adapter['largest_load']:.1%};"
                f" {adapter['dead_experts']} experts get less than 1 %.\n"
            )
    for line in evaluation.get("notes", ()):
        text += f"\n{line}\n"
    return text


def _even(dev: Mapping[str, Any]) -> float:
    tables = next(iter(dev["load"].values()))
    return 1 / len(tables[0][0])


def _accuracy(measured: Mapping[str, Any] | None) -> str:
    if not measured:
        return ""
    low, high = measured["confidence95"]
    return f"{measured['accuracy']:.1%} ({low:.1%} – {high:.1%})"
