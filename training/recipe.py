"""Recipes: one TOML file says everything a run depends on. Read once, checked whole, errors name the entry.

Paths in a recipe are relative to the recipe file. The budget has up to three limits (steps, tokens, active minutes);
whichever is used up first ends the run, and the cosine follows the largest used-up share.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ming_app.errors import MingError
from ming_app.molora.config import MoLoRAConfig
from training import readers
from training.chat import DEFAULT_SYSTEM
from training.errors import RecipeError
from training.licences import FILTERS

MAX_INCLUDES = 4
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""tracker -> package it needs"""
PRECISIONS = ("auto", "float32", "bf16", "int8", "nf4")
EXAM_FORMATS = ("exam_letter", "exam_reasoning")
FORMATS = (*readers.FORMATS, *EXAM_FORMATS)


@dataclass(frozen=True)
class Stream:
    """One stream of rows: a file, how to read it, and its share of the mix."""

    name: str
    file: str
    weight: float
    """share of rows in every block of the mix, relative to the other streams"""
    format: str = "chat"
    """chat, conversations, sharegpt or alpaca (readers.py), or a bank of exam questions asked for the letter
    (exam_letter; options in a new order at every pass) or for reasoning, then letter (exam_reasoning)"""
    source: str = ""
    """source of rows that name none"""
    licence: str = ""
    """licence of sources that licences.toml does not know, as their repository states it"""
    bank: str = ""
    """exam bank with the same ids, whose tags tell rows of one source but different licences apart"""
    sources: tuple[str, ...] = ()
    """use only these sources; empty: all"""
    cap: int = 0
    """at most so many rows of each source, picked by hash of the id; 0: all"""
    max_length: int = 0
    """tokens, where the stream needs another limit than the mix; 0: that of the mix"""
    loss_weight: float = 1.0
    """weight of each of its answer tokens in the loss: a letter is one token among hundreds of running text, and what
    little its gradient says is drowned without"""
    repeats: bool = False
    """the last answer is made to repeat itself, and only to end it then is learnt (repeats.py); for conversations"""

    def problem(self) -> str:
        """What is wrong with the values, or ""."""
        if self.format not in FORMATS:
            return f"format {self.format!r} is not one of {', '.join(FORMATS)}"
        if not (self.weight > 0 and self.loss_weight > 0):
            return "weight and loss_weight must be positive"
        if self.repeats and self.format in EXAM_FORMATS:
            return "repeats is for conversations, not for a bank of exam questions"
        return "cap and max_length must not be negative" if self.cap < 0 or self.max_length < 0 else ""


@dataclass(frozen=True)
class Data:
    """What the streams have in common."""

    folder: str
    max_length: int = 320
    """tokens; longer rows are left out, never cut"""
    system: str = DEFAULT_SYSTEM
    licences: str = "stated"
    """any, stated or open (see licences.py)"""
    languages: tuple[str, ...] = ()
    """use only rows in these languages; empty: all"""
    evaluation: tuple[str, ...] = ()
    """files whose questions must not be trained on, under any id (see leaks.py): rows that give one away are dropped"""
    held_out: float = 0.03
    """share of every stream kept from training, chosen by hash of the row id: the same question in two streams stays
    out of both"""
    held_out_rows: int = 24
    """rows of each stream's held-out share that the dev loss is measured on"""
    block: int = 192
    """rows drawn from the streams at a time and packed into micro-batches"""
    packing: bool = True
    """samples of any length in one row, attention kept inside each; false: right-padded rows of one length"""
    broken_lines: str = "stop"
    """stop, or skip (counted)"""

    def problem(self) -> str:
        """What is wrong with the values, or ""."""
        if self.licences not in FILTERS:
            return f"licences {self.licences!r} is not one of {', '.join(FILTERS)}"
        if self.broken_lines not in ("stop", "skip"):
            return "broken_lines must be stop or skip"
        if not 0 < self.held_out < 0.5:
            return "held_out must be between 0 and 0.5"
        return (
            "max_length, block and held_out_rows must be at least 8, 1 and 1"
            if self.max_length < 8 or self.block < 1 or self.held_out_rows < 1
            else ""
        )


@dataclass(frozen=True)
class Budget:
    """How long to train. A limit of 0 is no limit; one at least must be set."""

    steps: int = 0
    tokens: int = 0
    """real tokens read, prompt and answer"""
    max_minutes: float = 0
    """active minutes: a stopped process does not use them up, nor (on a CPU) time given to other programs"""
    batch_tokens: int = 1024
    """tokens per micro-batch, padding counted"""
    accumulate: int = 1
    """micro-batches per step"""

    def problem(self) -> str:
        """What is wrong with the values, or ""."""
        if min(self.steps, self.tokens, self.max_minutes) < 0 or max(self.steps, self.tokens, self.max_minutes) <= 0:
            return "one of steps, tokens and max_minutes must be positive"
        return (
            "batch_tokens must be at least 16 and accumulate at least 1"
            if self.batch_tokens < 16 or self.accumulate < 1
            else ""
        )


@dataclass(frozen=True)
class Start:
    """What the experts start from; one of the two, or neither (see start.py)."""

    adapter: str = ""
    """folder of an adapter of the same configuration"""
    lora: str = ""
    """folder of one LoRA that every expert becomes a copy of"""

    def problem(self) -> str:
        """What is wrong with the values, or ""."""
        return "name an adapter or a lora, not both" if self.adapter and self.lora else ""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and cosine."""

    lr: float = 2e-4
    warmup: float = 0.03
    """share of the budget"""
    final: float = 0.05
    """share of lr reached at the end"""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    """largest gradient norm"""
    explosion: float = 4.0
    """a loss of so many times its recent mean stops the run; 0: only one that is not finite does"""

    def problem(self) -> str:
        """What is wrong with the values, or ""."""
        if not 0 < self.lr < 1:
            return "lr must be between 0 and 1"
        if not (0 <= self.warmup < 1 and 0 <= self.final <= 1 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            return "warmup, final, beta1 and beta2 must be between 0 and 1"
        return (
            "weight_decay and explosion must not be negative, clip must be positive"
            if self.weight_decay < 0 or self.clip <= 0 or self.explosion < 0
            else ""
        )


@dataclass(frozen=True)
class RouterTerms:
    """Coefficients of the router losses; 0 leaves a term out (it is logged all the same)."""

    balance: float = 0.0
    z: float = 0.0

    def problem(self) -> str:
        """What is wrong with the values, or ""."""
        return "coefficients must not be negative" if min(self.balance, self.z) < 0 else ""


@dataclass(frozen=True)
class Saving:
    """When to write checkpoints and measure the dev loss, in active minutes; a checkpoint is written on SIGTERM too."""

    every_minutes: float = 5.0
    every_steps: int = 0
    """0: by minutes only"""
    eval_every_minutes: float = 0.0
    """0: at the end only"""
    best_by: tuple[str, ...] = ()
    """streams whose mean dev loss decides which adapter is kept as the best; empty: all"""
    trackers: tuple[str, ...] = ()
    """tensorboard, wandb: besides metrics.jsonl"""

    def problem(self) -> str:
        """What is wrong with the values, or ""."""
        if not set(self.trackers) <= set(TRACKERS):
            return f"trackers must be among {', '.join(TRACKERS)}"
        return (
            "values must not be negative"
            if min(self.every_minutes, self.every_steps, self.eval_every_minutes) < 0
            else ""
        )


@dataclass(frozen=True)
class Recipe:
    """One run. `base` is a catalogue name, a local folder or a hub id."""

    name: str
    base: str
    data: Data
    stream: tuple[Stream, ...]
    budget: Budget
    adapter: MoLoRAConfig = field(default_factory=MoLoRAConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    router: RouterTerms = field(default_factory=RouterTerms)
    start: Start = field(default_factory=Start)
    save: Saving = field(default_factory=Saving)
    seed: int = 1
    precision: str = "auto"
    """of the frozen base: float32, bf16, int8 or nf4 by bitsandbytes (QLoRA); auto: bf16 where the device computes in it,
    else float32"""
    gradient_checkpointing: bool = False
    """forget activations inside each layer and compute them anew in the backward pass: less memory, a third more time"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 0
    """CPU threads; 0: as torch chooses"""
    folder: Path = Path(".")
    """folder of the recipe file, set when read"""

    def path(self, relative: str) -> Path:
        """A path of the recipe, made absolute."""
        return (self.folder / relative).resolve()

    def data_path(self, name: str) -> Path:
        """A file in the data folder."""
        return self.path(self.data.folder) / name

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the folder."""
        values = asdict(self)
        values.pop("folder")
        values["adapter"] = self.adapter.to_dict()
        return typing.cast(dict[str, Any], json.loads(json.dumps(values)))

    def identity(self) -> str:
        """SHA-256 of all that decides which losses a run gives; budget limits, the guard against explosions, saving,
        device and threads may change between a run and its resumption."""
        values = self.to_dict()
        for free in ("save", "device", "threads", "gradient_checkpointing"):
            values.pop(free)
        for limit in ("steps", "tokens", "max_minutes"):
            values["budget"].pop(limit)
        values["optimizer"].pop("explosion")
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe file. Raises RecipeError that names the entry at fault."""
    recipe: Recipe = read_toml(Recipe, path, "recipe", leave_out=("folder",))
    names = [stream.name for stream in recipe.stream]
    if not names or len(set(names)) != len(names):
        raise _wrong("stream", "at least one is needed, and names must differ")
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise _wrong("device", "must be auto, cpu or cuda")
    if recipe.precision not in PRECISIONS:
        raise _wrong("precision", f"must be one of {', '.join(PRECISIONS)}")
    unknown = sorted(set(recipe.save.best_by) - set(names))
    if unknown:
        raise _wrong("save.best_by", f"names no stream: {', '.join(unknown)}")
    return replace(recipe, folder=Path(path).resolve().parent)


def read_toml(kind: Any, path: str | Path, what: str, leave_out: tuple[str, ...] = ()) -> Any:
    """A dataclass of `kind` from a TOML file, every entry checked. Raises RecipeError.

    `include = "other.toml"` takes the entries of another file, beside it or by path; entries of the file itself come first,
    table by table. Tables of a list that have the same `name` in both files are one table, so a recipe may say of an
    included stream only what differs.
    """
    values = _read_values(Path(path), what, depth=0)
    for name in leave_out:
        values.pop(name, None)
    return _build(kind, values, what)


def _read_values(path: Path, what: str, depth: int) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"The {what} {path} cannot be read: {error.strerror}.", f"无法读取 {path}：{error.strerror}。"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"The {what} {path.name} is not valid TOML: {error}.", f"{path.name} 不是有效的 TOML：{error}。"
        ) from error
    other = values.pop("include", "")
    if not isinstance(other, str) or (other and depth >= MAX_INCLUDES):
        raise _wrong("include", f"must name one file, and at most {MAX_INCLUDES} may follow one another")
    return _merged(_read_values(path.parent / other, what, depth + 1), values) if other else values


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            merged[name] = _merged(below[name], above[name])
        elif _are_named(below[name]) and _are_named(above[name]):
            merged[name] = list(_merged(_by_name(below[name]), _by_name(above[name])).values())
    return merged


def _are_named(value: Any) -> bool:
    """A list of tables, each with a `name` of its own."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return False
    names = [entry.get("name") for entry in value]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _by_name(tables: list[dict[str, Any]]) -> dict[str, Any]:
    return {table["name"]: table for table in tables}


def _build(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from TOML values; unknown entries, wrong types and values out of range are refused by name."""
    if not isinstance(values, dict):
        raise _wrong(where, "must be a table")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise _wrong(f"{where}.{name}", f"is not known; possible entries: {', '.join(known)}")
    built = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        result = kind(**built)
    except TypeError as error:
        missing = [n for n, f in known.items() if n not in values and f.default is f.default_factory]  # both MISSING
        raise _wrong(where, f"lacks {', '.join(missing)}") from error
    except MingError as error:
        raise _wrong(where, error.en.rstrip(".")) from error
    problem = result.problem() if hasattr(result, "problem") else ""
    if problem:
        raise _wrong(where, problem)
    return result


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "must be a list")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, types.UnionType):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(where, f"must be of type {hint.__name__}, found {value!r}")
    return value


def _wrong(where: str, problem: str) -> RecipeError:
    return RecipeError(f"Recipe entry `{where}`: {problem}.", f"配方条目 `{where}` 有误：{problem}。")
