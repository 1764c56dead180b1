"""The model as tools of another assistant, by the Model Context Protocol: ask, explain, trace, triage; over stdio.

Contract: the model loads in the background, so a client is connected at once; a tool that needs it waits and reports progress. A
warning of an emergency stands before every word of the model, and stays when the model fails. What goes wrong is told in
words, in the caller's language. A cancelled call frees the model within two tokens. No tool reads or writes a file, and no log holds
what was asked. Needs requirements-mcp.txt; nothing else imports this module.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import Context, MCPServer
from mcp.types import CallToolResult, ContentBlock, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from ming_app import __version__
from ming_app.engine.types import DEADLINE, EngineInfo, Finish, Message, SamplingParams, Token
from ming_app.errors import MingError, UsageError
from ming_app.exam.question import Question, language_of, make_question
from ming_app.molora.trace import RouterTrace
from ming_app.molora.trace_file import to_json
from ming_app.router.tables import load_table
from ming_app.safety import notices
from ming_app.safety.output import check_answer, note_text
from ming_app.serve.answers import events
from ming_app.settings import Settings
from ming_app.trace_report import summarize
from ming_app.ui.chat import MAX_CHARS
from ming_app.ui.exam import tutor
from ming_app.ui.loader import EngineLoader, LoadState
from ming_app.ui.text import refusal, t

logger = logging.getLogger(__name__)

POLL_SECONDS, UPDATE_SECONDS = 0.1, 0.5
INSTRUCTIONS = (
    "MING-MOE, a small bilingual (Chinese, English) medical language model for learning. It is not a physician, and its answers can "
    "be wrong: check them, pass on every `warning` first, and keep the AI label. `triage` needs no model and is quick; the others wait "
    "until the model is loaded."
)

Lang = Annotated[
    Literal["en", "zh"] | None, Field(description="language of warnings, notes and errors; by default that of the text")
]
Asked = Annotated[str, Field(description=f"a question in Chinese or English, at most {MAX_CHARS} characters")]
NewTokens = Annotated[int, Field(description="longest answer, in tokens")]
Seed = Annotated[int | None, Field(description="0 or more makes the answer reproducible")]
Options = Annotated[list[str], Field(description="texts of the options A, B, ... in order, without their letters")]
Key = Annotated[str, Field(description='letter of the right option ("B"; several: "ABD"), or its text')]


class Said(BaseModel):
    """What the model answered, and what must stand beside it."""

    warning: str = Field(description="signs of an emergency in the question and whom to call; empty: none found")
    text: str
    notes: list[str] = Field(description="what to mind in this answer, by fixed rules")
    ai_label: str
    finish_reason: str = Field(description="stop, length, deadline, cancelled or closing")
    model: str


class LayerLoad(BaseModel):
    """`load`: each expert's share of the choices in this layer."""

    layer: int
    load: list[float]


class Traced(Said):
    """An answer and which experts fired for it. Shares of E experts sum to 1; even use gives each `even_share`."""

    num_experts: int
    top_k: int
    even_share: float
    load: dict[str, list[float]] = Field(description="share of each expert: of all tokens, the prompt's, the answer's")
    layers: list[LayerLoad]
    router_trace: dict[str, Any] | None = Field(description="every choice, in the form of a trace file (.json)")


class Triaged(BaseModel):
    """`message`: what to do and whom to call; empty where no sign was found."""

    red_flag: bool
    category: str
    lang: str
    matched: list[str]
    message: str


class Tools:
    """The four tools over one engine that may still be loading."""

    def __init__(self, loader: EngineLoader, settings: Settings):
        self._loader, self._region = loader, settings.region

    async def ask(
        self, question: Asked, ctx: Context, lang: Lang = None, max_new_tokens: NewTokens = 512, seed: Seed = None
    ) -> Annotated[CallToolResult, Said]:
        """Asks the medical model one question. The answer may be wrong; a warning of an emergency comes before it."""
        shown = lang or language_of(question)
        warning = self._warning(question, shown)

        async def work() -> CallToolResult:
            _check(question)
            params = SamplingParams(max_new_tokens, seed=seed, deadline=DEADLINE, trace=False)
            text, finish, info = await self._answer(ctx, question, params)
            return _result(_said(text, finish, info, shown, warning))

        return await _told(work(), shown, warning)

    async def explain(
        self, stem: str, options: Options, answer: Key, ctx: Context, lang: Lang = None, max_new_tokens: NewTokens = 400
    ) -> Annotated[CallToolResult, Said]:
        """Explains a medical exam question: why the given key is right and the other options are not. The key stands: a note
        says so where the model ends on another option."""

        async def work() -> CallToolResult:
            question = make_question({"stem": stem, "options": options, "answer": answer})
            params = SamplingParams(max_new_tokens, temperature=0.3, deadline=DEADLINE, trace=False)
            prompt = tutor.request("explain", question, list(question.options))
            _check(prompt)
            text, finish, info = await self._answer(ctx, prompt, params)
            said = _said(text, finish, info, lang or question.lang, "")
            said.notes += _contradiction(text, question, lang or question.lang)
            return _result(said)

        return await _told(work(), lang or language_of(stem))

    async def trace(
        self,
        question: Asked,
        ctx: Context,
        lang: Lang = None,
        max_new_tokens: NewTokens = 64,
        full: Annotated[bool, Field(description="the whole trace too: hundreds of kilobytes of JSON")] = False,
    ) -> Annotated[CallToolResult, Traced]:
        """Asks the model, greedily, and tells which of its experts fired: each one's share over the prompt, the answer and every
        layer, beside the share that even use would give. Experts tend to follow form more than topic."""
        shown = lang or language_of(question)
        warning = self._warning(question, shown)

        async def work() -> CallToolResult:
            _check(question)
            params = SamplingParams(max_new_tokens, temperature=0.0, deadline=DEADLINE)
            text, finish, info = await self._answer(ctx, question, params)
            if finish.trace is None:
                raise UsageError(
                    "This model has no experts, so there is nothing to trace.", "该模型没有专家，无轨迹可记录。"
                )
            said = _traced(_said(text, finish, info, shown, warning), finish.trace, full)
            return _result(said, _load_lines(said, shown))

        return await _told(work(), shown, warning)

    def triage(
        self, text: Annotated[str, Field(description="what a person wrote about their complaint")], lang: Lang = None
    ) -> Annotated[CallToolResult, Triaged]:
        """Looks for signs of an emergency by fixed rules; needs no model, takes milliseconds. It can miss: nothing found is no
        all-clear."""
        shown = lang or language_of(text)
        try:
            _check(text)
        except MingError as error:
            return _refused(error.message(shown))
        found = Triaged(**notices.triage(text, self._region, shown))
        nothing = {
            "en": "No sign of an emergency was found. This is no all-clear: in doubt, see a doctor.",
            "zh": "未发现急症信号。这不代表没有危险，如有疑虑请就医。",
        }
        return CallToolResult(content=_blocks(found.message or nothing[shown]), structured_content=found.model_dump())

    # -- the model ----------------------------------------------------------------------------------------------------

    def _warning(self, question: str, lang: str) -> str:
        return str(notices.triage(question[:MAX_CHARS], self._region, lang)["message"])

    async def _engine(self, ctx: Context) -> Any:
        """The engine once it is loaded; a load that failed is tried once more. Raises MingError."""
        self._loader.start()
        begin = time.monotonic()
        reported = begin
        while (state := self._loader.state).busy:
            now = time.monotonic()
            if now - reported >= UPDATE_SECONDS:
                reported, waited = now, now - begin
                # the protocol wants progress to grow; loading has stages, and nobody knows how far the next ones are
                await ctx.report_progress(waited / (1 + waited), message=_stage(state))
            await asyncio.sleep(POLL_SECONDS)
        if state.engine is not None:
            return state.engine
        if isinstance(state.error, MingError):
            raise state.error
        raise refusal("refuse.unexpected", kind=type(state.error).__name__)

    async def _answer(self, ctx: Context, prompt: str, params: SamplingParams) -> tuple[str, Finish, EngineInfo]:
        engine = await self._engine(ctx)
        text, tokens, reported = "", 0, 0.0
        async with aclosing(events(engine, [Message("user", prompt)], params)) as stream:  # type: ignore[type-var]
            async for event in stream:
                if isinstance(event, Finish):
                    return text, event, engine.info
                if isinstance(event, Token):
                    text, tokens = text + event.text, tokens + len(event.tokens)
                    if time.monotonic() - reported >= UPDATE_SECONDS:
                        reported = time.monotonic()
                        await ctx.report_progress(1 + tokens, 1 + params.max_new_tokens)
        raise RuntimeError("the engine ended without a Finish event")


def _stage(state: LoadState) -> str:
    """What loading does now, for people."""
    step = state.progress
    share = f" {step.done / step.total:.0%}" if step is not None and step.total > 0 else ""
    return t("en", f"load.{step.stage if step is not None else 'load'}") + share


def _check(text: str) -> None:
    if not text.strip():
        raise refusal("refuse.empty")
    if len(text) > MAX_CHARS:
        raise refusal("refuse.long", n=len(text), limit=MAX_CHARS)


# -- results ----------------------------------------------------------------------------------------------------------


def _said(text: str, finish: Finish, info: EngineInfo, lang: str, warning: str) -> Said:
    notes = [note_text(one.check, lang) for one in check_answer(text)]
    return Said(
        warning=warning,
        text=text,
        notes=notes,
        ai_label=notices.AI_LABEL[lang],
        finish_reason=finish.reason,
        model=f"{info.title}, {info.precision}",
    )


def _contradiction(text: str, question: Question, lang: str) -> list[str]:
    letter, right = tutor.final_letter(text), "".join(question.answer)
    if not letter or letter in right:
        return []
    return [t(lang, "exam.ai.chose_several", letter=letter) + t(lang, "exam.ai.differs", right=right)]


def _traced(said: Said, trace: RouterTrace, full: bool) -> Traced:
    summary = summarize(trace)
    layers = [
        LayerLoad(layer=i, load=[round(expert.share, 4) for expert in load_table(trace, layer=i)])
        for i in range(trace.num_layers)
    ]
    return Traced(
        **said.model_dump(),
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        even_share=summary["uniform"],
        load=summary["load"],
        layers=layers,
        router_trace=to_json(trace) if full else None,
    )


def _load_lines(said: Traced, lang: str) -> str:
    """A line per expert, and the busiest expert of every layer."""
    zh = lang == "zh"
    lines = [
        f"各专家占比（均匀为 {said.even_share:.1%}）" if zh else f"Load per expert (even use: {said.even_share:.1%})"
    ]
    for expert in range(said.num_experts):
        prompt, answer = (said.load[role][expert] for role in ("prompt", "answer"))
        part = f"提示 {prompt:.1%}，回答 {answer:.1%}" if zh else f"prompt {prompt:.1%}, answer {answer:.1%}"
        lines.append(f"  {expert}: {part}")
    busiest = (f"{row.layer}: {row.load.index(max(row.load))} ({max(row.load):.0%})" for row in said.layers)
    return "\n".join([*lines, ("各层最常用的专家 " if zh else "Busiest expert by layer ") + "; ".join(busiest)])


def _blocks(*texts: str) -> list[ContentBlock]:
    return [TextContent(type="text", text=text) for text in texts if text]


def _result(said: Said, more: str = "") -> CallToolResult:
    """For programs the object, for people its texts: the warning first, the label last."""
    blocks = _blocks(said.warning, said.text, *said.notes, more, said.ai_label)
    return CallToolResult(content=blocks, structured_content=said.model_dump())


def _refused(reason: str, warning: str = "") -> CallToolResult:
    return CallToolResult(content=_blocks(warning, reason), is_error=True)


async def _told(work: Awaitable[CallToolResult], lang: str, warning: str = "") -> CallToolResult:
    """The result, or in words why there is none. A bug is logged by kind and place, without anybody's words."""
    try:
        return await work
    except MingError as error:
        return _refused(error.message(lang), warning)
    except Exception as error:
        kind, place = type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
        logger.error("a tool failed: %s\n%s", kind, place)
        return _refused(t(lang, "refuse.unexpected", kind=kind), warning)


# -- the server -------------------------------------------------------------------------------------------------------


def build_server(loader: EngineLoader, settings: Settings) -> MCPServer:
    """The server; while it runs, the loader loads and keeps the engine."""

    @asynccontextmanager
    async def life(server: MCPServer) -> AsyncIterator[None]:
        loader.start()
        try:
            yield
        finally:
            loader.close()

    server: MCPServer = MCPServer(
        "ming-app",
        title="MING-MOE",
        version=__version__,
        instructions=INSTRUCTIONS,
        log_level="WARNING",
        lifespan=life,
    )
    tools = Tools(loader, settings)
    hints = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    server.add_tool(tools.ask, title="Ask the medical model", annotations=hints)
    server.add_tool(tools.explain, title="Explain an exam question", annotations=hints)
    server.add_tool(tools.trace, title="Show which experts fired", annotations=hints)
    server.add_tool(tools.triage, title="Look for signs of an emergency", annotations=hints)
    return server


def serve_stdio(loader: EngineLoader, settings: Settings) -> None:
    """Serves the client that started this process, until it closes stdin. The SDK keeps stdout to the protocol: while it
    serves, whatever a library prints goes to stderr."""
    build_server(loader, settings).run("stdio")
