"""The decoder, with MoLoRA and routing inside, as an ONNX graph over packed tokens.

All T tokens of a call lie in one flat list, whatever rows they belong to; only attention sees rows, [B, S] with S the
longest piece, padded on the right. Names of inputs and outputs (L layers, P = 3 projections, M = L P):

    embeds float32 [T, H]           row_of int64 [T]: row of each token           router_bias float32 [B, M E]
    pad int64 [B, S]: token at each place (padding: any)     unpad int64 [T]: place in B*S of each token
    past_lengths int32 [B]: tokens in the row after the call, less one     new_lengths int32 [B]: tokens of the row in the call
    longest int32 []: of `past_lengths` + 1                 cos, sin float32 [positions, D / 2]
    wanted int64 [n]: tokens whose logits are asked for     past_k.l, past_v.l float32 [B, kv heads, capacity, D]

    logits float32 [n, V]     experts uint8 [T, M, k]     weights float32 [T, M, k]     present_k.l, present_v.l

Past and present are bound to the same memory: the cache is updated in place. MoLoRA on a linear W [N, K]:

    h = A x [E r], l = W_s x + bias        S, w = top-k and its softmax        m = w scattered to [E], repeated r times
    y = [W | s B] [x ; m h]                one quantised matrix: B is stored as extra columns of W

gate and up share x, so they share A, the routers and the top-k. A shared expert is rank rows whose m is always 1.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ming_app.engine.backends.onnx_quant import Quantised, carry_over, join, quantise
from ming_app.engine.backends.onnx_spec import WEIGHTS, BaseShape, Format, Recipe
from ming_app.errors import WeightsError
from ming_app.molora.config import PROJECTIONS, MoLoRAConfig

if TYPE_CHECKING:
    from ming_app.models.progress import Meter
    from ming_app.models.tensors import TensorSource
    from ming_app.molora.checkpoint import Adapter, ProjectionWeights

CONTRIB = "com.microsoft"
ALIGNMENT = 4096  # of tensors in weights.bin: whole pages, so that each is mapped and let go on its own
INLINE_BYTES = 4096  # smaller tensors stay in model.onnx


class Packed(NamedTuple):
    """A matrix quantised already."""

    values: Quantised
    width: int
    """K: columns, the last block may be longer"""


T = TypeVar("T")


class WeightStore:
    """The initialisers of all graphs of a build, by name. Large ones go to `weights.bin` as they come, so that none stays
    in memory; what a graph written earlier has stored is not made again."""

    def __init__(self, weights: IO[bytes]):
        self._weights = weights
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._facts: dict[str, Any] = {}

    def tensor(self, name: str, make: Callable[[], np.ndarray]) -> onnx.TensorProto:
        """The initialiser of that name; `make` is called only the first time."""
        if name not in self._tensors:
            self._tensors[name] = self._stored(name, np.ascontiguousarray(make()))
        return self._tensors[name]

    def fact(self, name: str, make: Callable[[], T]) -> T:
        """Something small that is costly to find out, remembered."""
        if name not in self._facts:
            self._facts[name] = make()
        return typing.cast(T, self._facts[name])

    def _stored(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        if array.nbytes <= INLINE_BYTES:
            return numpy_helper.from_array(array, name)
        offset = -(-self._weights.tell() // ALIGNMENT) * ALIGNMENT
        self._weights.seek(offset)
        self._weights.write(array.data)
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class GraphWriter:
    """Collects the nodes of one graph over a store of weights."""

    def __init__(self, store: WeightStore):
        self.store = store
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declares a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declares a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def constant(self, name: str, array: np.ndarray | Callable[[], np.ndarray]) -> str:
        """Declares an initialiser, given as it is or as a function that makes it."""
        if name not in self._initialisers:
            make = array if callable(array) else lambda: array
            self._initialisers[name] = self.store.tensor(name, make)
        return name

    def node(self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node and returns its first output."""
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def linear(
        self,
        name: str,
        x: str,
        weight: Callable[[], np.ndarray | Packed],
        fmt: Format,
        bias: np.ndarray | None = None,
    ) -> str:
        """x [T, K] -> [T, N] through `weight()` [N, K], quantised here if float32; int8 arithmetic (accuracy_level 4)."""

        @functools.cache
        def packed() -> Packed:
            made = weight()
            return made if isinstance(made, Packed) else Packed(quantise(made, fmt), made.shape[1])

        n, k = self.store.fact(name, lambda: (packed().values.q.shape[0], packed().width))
        inputs = [
            x,
            self.constant(f"{name}.q", lambda: packed().values.q),
            self.constant(f"{name}.scale", lambda: packed().values.scales),
            self.constant(f"{name}.zero", lambda: packed().values.zeros),
        ]
        if bias is not None:
            inputs += ["", self.constant(f"{name}.bias", bias)]
        sizes = {"N": n, "K": k, "bits": fmt.bits, "block_size": fmt.block}
        return self.node("MatMulNBits", inputs, name, domain=CONTRIB, accuracy_level=4, **sizes)

    def save(self, path: Path) -> None:
        """Writes the graph, beside the weights."""
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initialisers.values())
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


class DecoderGraph:
    """Writes one decoder. `source` gives the base's tensors, `adapter` (or None) MoLoRA and attention LoRA."""

    def __init__(
        self, writer: GraphWriter, source: TensorSource, adapter: Adapter | None, shape: BaseShape, recipe: Recipe
    ):
        self.w = writer
        self.source = source
        self.adapter = adapter
        self.shape = shape
        self.recipe = recipe
        self._names = set(source.names())
        # by the number of projections that share an input: names of what every layer records, [T, 2, k] or [T, k] each
        self._records: dict[int, list[dict[str, str]]] = {2: [], 1: []}
        self._check_names()

    def write(self, path: Path, meter: Meter | None = None) -> None:
        """Writes all layers and the head, then the graph to `path`."""
        s = self.shape
        self._declare_inputs()
        x, skip = "embeds", ""
        for layer in range(s.layers):
            x, skip = self._layer(layer, x, skip)
            if meter:
                meter.update(layer + 1)
        normed, _ = self._norm("norm", x, skip, "model.norm.weight")
        wanted = self.w.node("Gather", [normed, "wanted"], "head.x", axis=0)
        head = "model.embed_tokens.weight" if s.tied or "lm_head.weight" not in self._names else "lm_head.weight"
        table = functools.partial(self._get, head, s.vocab, s.hidden)
        self.w.linear("logits", wanted, table, self.recipe.head, self._bias("lm_head"))
        self.w.output("logits", TensorProto.FLOAT, ["n", s.vocab])
        if self.adapter:
            self._declare_records()
        self.w.save(path)

    def _declare_records(self) -> None:
        self.w.node("Cast", [self._in_trace_order("experts.int64", "ids")], "experts", to=TensorProto.UINT8)
        self._in_trace_order("weights", "weights")
        dims: list[int | str] = ["T", 3 * self.shape.layers, self._chosen]
        self.w.output("experts", TensorProto.UINT8, dims)
        self.w.output("weights", TensorProto.FLOAT, dims)

    def _in_trace_order(self, name: str, what: str, width: int = 0) -> str:
        """[T, 3 L, width], layer by layer gate, up, down, of what was recorded of all layers; width 0: experts chosen."""
        w, layers, width = self.w, self.shape.layers, width or self._chosen
        parts = []
        for slots, records in self._records.items():
            joined = w.node("Concat", [record[what] for record in records], f"{name}.{slots}", axis=1)
            dims = w.constant(f"trace.dims.{slots}.{width}", np.array([-1, layers, slots, width], np.int64))
            parts.append(w.node("Reshape", [joined, dims], f"{name}.{slots}.layers"))
        flat = w.constant(f"trace.dims.{width}", np.array([-1, 3 * layers, width], np.int64))
        return w.node("Reshape", [w.node("Concat", parts, f"{name}.all", axis=2), flat], name)

    @property
    def _chosen(self) -> int:
        """Experts that the graph chooses per cell."""
        return self._molora.top_k

    def _declare_inputs(self) -> None:
        s, w = self.shape, self.w
        w.input("embeds", TensorProto.FLOAT, ["T", s.hidden])
        w.input("pad", TensorProto.INT64, ["B", "S"])
        w.input("unpad", TensorProto.INT64, ["T"])
        for name in ("past_lengths", "new_lengths"):
            w.input(name, TensorProto.INT32, ["B"])
        w.input("longest", TensorProto.INT32, [])
        for name in ("cos", "sin"):
            w.input(name, TensorProto.FLOAT, ["positions", s.head_dim // 2])
        w.input("wanted", TensorProto.INT64, ["n"])
        if self.adapter:
            experts = self.adapter.config.num_experts
            w.input("row_of", TensorProto.INT64, ["T"])
            self._per_row("router_bias", experts)

    def _per_row(self, name: str, width: int) -> None:
        """Declares an input [B, 3 L width] and gives each layer's parts to its tokens: `{layer}.{gate_up, down}.{name}`."""
        w, layers = self.w, self.shape.layers
        w.input(name, TensorProto.FLOAT, ["B", 3 * layers * width])
        sizes = w.constant(f"{name}.sizes", np.array([2 * width, width] * layers, np.int64))
        spread = w.node("Gather", [name, "row_of"], f"{name}.spread", axis=0)
        names = [f"{layer}.{part}.{name}" for layer in range(layers) for part in ("gate_up", "down")]
        w.node("Split", [spread, sizes], *names, axis=1)

    def _layer(self, layer: int, x: str, skip: str) -> tuple[str, str]:
        """One decoder layer: (residual, last branch) -> the same, still to be added."""
        p = f"model.layers.{layer}."
        normed, residual = self._norm(f"{layer}.norm1", x, skip, p + "input_layernorm.weight")
        attended = self._attention(layer, normed)
        normed, residual = self._norm(f"{layer}.norm2", residual, attended, p + "post_attention_layernorm.weight")
        gate, up = self._ffn_linears(layer, "gate_up", normed, ("gate", "up"), self.recipe.gate_up)
        swish = self.w.node("QuickGelu", [gate], f"{layer}.swish", domain=CONTRIB, alpha=1.0)  # x sigmoid(x)
        inner = self.w.node("Mul", [swish, up], f"{layer}.inner")
        (down,) = self._ffn_linears(layer, "down", inner, ("down",), self.recipe.down)
        return residual, down

    def _norm(self, name: str, x: str, skip: str, weight: str) -> tuple[str, str]:
        """RMS norm of x (+ skip) -> (normed, the sum)."""
        gain = self.w.constant(f"{name}.gain", functools.partial(self._get, weight, self.shape.hidden))
        eps = self.shape.norm_eps
        if not skip:
            return self.w.node("SimplifiedLayerNormalization", [x, gain], name, axis=-1, epsilon=eps, stash_type=1), x
        total = f"{name}.sum"
        self.w.node(
            "SkipSimplifiedLayerNormalization", [x, skip, gain], name, "", "", total, domain=CONTRIB, epsilon=eps
        )
        return name, total

    def _attention(self, layer: int, x: str) -> str:
        s, w, p = self.shape, self.w, f"{layer}."
        widths = {"q": s.heads * s.head_dim, "k": s.kv_heads * s.head_dim, "v": s.kv_heads * s.head_dim}

        def weight() -> np.ndarray:
            return np.concatenate([self._merged(layer, f"{n}_proj", rows, s.hidden) for n, rows in widths.items()])

        biases = {n: self._bias(f"model.layers.{layer}.self_attn.{n}_proj") for n in widths}
        bias = None
        if any(b is not None for b in biases.values()):
            bias = np.concatenate([np.zeros(widths[n], np.float32) if b is None else b for n, b in biases.items()])
        qkv = w.linear(p + "qkv", x, weight, self.recipe.attention, bias)
        qkv = self._attention_gated(layer, [f"{n}_proj" for n in widths], x, qkv, list(widths.values()))
        rows = w.node("Gather", [qkv, "pad"], p + "qkv.rows", axis=0)  # [B, S, .]
        past, present = ([f"{when}_{kind}.{layer}" for kind in "kv"] for when in ("past", "present"))
        for name in past:
            w.input(name, TensorProto.FLOAT, ["B", s.kv_heads, "capacity", s.head_dim])
        for name in present:
            w.output(name, TensorProto.FLOAT, ["B", s.kv_heads, "capacity", s.head_dim])
        unused = [""] * 7  # position_ids, attention_bias, head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight
        inputs = [rows, "", "", *past, "past_lengths", "longest", "cos", "sin", *unused, "new_lengths"]
        attributes = {"num_heads": s.heads, "kv_num_heads": s.kv_heads, "do_rotary": 1, "rotary_interleaved": 0}
        mixed = w.node("GroupQueryAttention", inputs, p + "attention", *present, domain=CONTRIB, **attributes)
        flat = w.constant("attention.flat", np.array([-1, widths["q"]], np.int64))
        mixed = w.node("Reshape", [mixed, flat], p + "attention.flat")
        mixed = w.node("Gather", [mixed, "unpad"], p + "attention.tokens", axis=0)  # [T, .]
        merged = functools.partial(self._merged, layer, "o_proj", s.hidden, widths["q"])
        bias = self._bias(f"model.layers.{layer}.self_attn.o_proj")
        out = w.linear(p + "o", mixed, merged, self.recipe.attention, bias)
        return self._attention_gated(layer, ["o_proj"], mixed, out, [s.hidden])

    def _attention_gated(self, layer: int, targets: Sequence[str], x: str, y: str, sizes: Sequence[int]) -> str:
        """y = (W + s B A) x of the targets side by side, `sizes` rows each; here as merged."""
        return y

    def _ffn_linears(self, layer: int, part: str, x: str, projections: Sequence[str], fmt: Format) -> list[str]:
        """The projections that read x: [W | s B | offsets] on [x ; m h ; block sums of x], as far as each is there."""
        s, w = self.shape, self.w
        rows, width = (s.hidden, s.ffn) if part == "down" else (s.ffn, s.hidden)
        names = [f"model.layers.{layer}.mlp.{p}_proj" for p in projections]
        weights = functools.cache(lambda: [self._get(f"{name}.weight", rows, width) for name in names])
        carried = functools.cache(lambda: self._carry(weights()))
        is_carried = w.store.fact(f"{layer}.{part}.carried", lambda: carried() is not None)
        fmt = self.recipe.carry if is_carried and self.recipe.carry else fmt
        extra: list[list[str]] = [[] for _ in projections]
        ranks, molora, scaled = None, [], []
        if self.adapter is not None:
            molora = [self.adapter.projection(layer, p) for p in projections]
            ranks = RankRows.of(self._molora, width, fmt, whole=is_carried)
            scaled = self._scaled_ranks(layer, part, x, molora, ranks)
            extra = [[one] for one in scaled]
        if is_carried:
            sums = self._block_sums(layer, part, x, width, fmt)
            extra = [[*into, sums] for into in extra]

        def matrix(index: int) -> np.ndarray | Packed:
            """[W | s B | offsets] of one projection."""
            columns = [ranks.stack_b(molora[index], self._molora.scale)] if ranks else []
            found = carried()
            if found is None:
                return np.concatenate([weights()[index], *columns], axis=1)
            exact, offsets = found[index]
            parts = [exact, *(quantise(more, fmt) for more in (*columns, offsets))]
            return Packed(join(parts, fmt), width + sum(more.shape[1] for more in (*columns, offsets)))

        out = []
        for index, projection in enumerate(projections):
            inputs = [x, *extra[index]]
            joined = w.node("Concat", inputs, f"{layer}.{projection}.x", axis=1) if len(inputs) > 1 else x
            make = functools.partial(matrix, index)
            out.append(w.linear(f"{layer}.{projection}", joined, make, fmt, self._bias(names[index])))
        if ranks:
            self._ffn_done(layer, part, x, out, molora, ranks, scaled, weights)
        return out

    def _ffn_done(
        self,
        layer: int,
        part: str,
        x: str,
        outputs: Sequence[str],
        molora: Sequence[ProjectionWeights],
        ranks: RankRows,
        scaled: Sequence[str],
        weights: Callable[[], list[np.ndarray]],
    ) -> None:
        """Called with the outputs and the m h of the projections that read x: a graph that measures adds its nodes here."""

    def _carry(self, weights: Sequence[np.ndarray]) -> list[tuple[Quantised, np.ndarray]] | None:
        """The exact 4-bit form of all these weights, or None when the recipe or the weights do not allow it."""
        if self.recipe.carry is None:
            return None
        found = []
        for weight in weights:
            exact = carry_over(weight, self.recipe.carry)
            if exact is None:
                return None
            found.append(exact)
        return found

    def _block_sums(self, layer: int, part: str, x: str, width: int, fmt: Format) -> str:
        """Sum of x over each quantisation block [T, width / block]: what the offsets of carried weights multiply."""
        w, name = self.w, f"{layer}.{part}"
        blocks = w.constant(f"blocks.{width}", np.array([-1, width // fmt.block, fmt.block], np.int64))
        last = w.constant("last_axis", np.array([-1], np.int64))
        return w.node("ReduceSum", [w.node("Reshape", [x, blocks], f"{name}.blocks"), last], f"{name}.sums", keepdims=0)

    def _scaled_ranks(
        self, layer: int, part: str, x: str, weights: Sequence[ProjectionWeights], ranks: RankRows
    ) -> list[str]:
        """m h for each projection that reads x."""
        w, name, slots = self.w, f"{layer}.{part}", len(weights)
        gate = self._gate(name, x, weights)
        stacked = functools.partial(_stacked, [functools.partial(ranks.stack_a, one) for one in weights])
        h = w.linear(f"{name}.A", x, stacked, self.recipe.rank)
        spread, always = ranks.spread(slots)
        key = f"{slots}.{ranks.size}"
        constants = [w.constant(f"spread.{key}", spread), w.constant(f"always.{key}", always)]
        mask = w.node("Gemm", [gate, *constants], f"{name}.mask")
        return self._acting(name, self._slots(w.node("Mul", [h, mask], f"{name}.scaled"), slots))

    def _slots(self, joined: str, slots: int) -> list[str]:
        """[T, slots n] -> [T, n] each."""
        if slots == 1:
            return [joined]
        parts = [f"{joined}.{slot}" for slot in range(slots)]
        self.w.node("Split", [joined], *parts, axis=1, num_outputs=slots)
        return parts

    def _gate(self, name: str, x: str, weights: Sequence[ProjectionWeights]) -> str:
        """Routers of the projections that share x: the dense gate [T, p E]; keeps ids and weights for the trace."""
        w, c, slots = self.w, self._molora, len(weights)
        router = w.constant(f"{name}.router", lambda: np.concatenate([one.router_weight for one in weights]).T)
        logits = w.node("Add", [w.node("MatMul", [x, router], f"{name}.raw"), f"{name}.router_bias"], f"{name}.logits")
        if slots > 1:
            apart = w.constant("router.apart", np.array([-1, slots, c.num_experts], np.int64))
            logits = w.node("Reshape", [logits, apart], f"{name}.logits.apart")
        k = w.constant(f"top_{self._chosen}", np.array([self._chosen], np.int64))
        w.node("TopK", [logits, k], f"{name}.top", f"{name}.ids", axis=-1)
        chosen = self._mixed(name, f"{name}.top", slots)
        empty = f"router.empty.{slots}"
        if not self._records[slots]:  # zeros of the right size, made once per call
            w.node("Mul", [logits, w.constant("nought", np.zeros((), np.float32))], empty)
        self._records[slots].append({"ids": f"{name}.ids", "weights": chosen, "logits": logits})
        dense = w.node("ScatterElements", [empty, f"{name}.ids", chosen], f"{name}.dense", axis=-1)
        if slots == 1:
            return dense
        flat = w.constant("router.flat", np.array([-1, slots * c.num_experts], np.int64))
        return w.node("Reshape", [dense, flat], f"{name}.gate")

    def _mixed(self, name: str, values: str, slots: int) -> str:
        """Logits of the chosen, sorted -> their weights."""
        return self.w.node("Softmax", [values], f"{name}.weights", axis=-1)

    def _acting(self, name: str, scaled: list[str]) -> list[str]:
        """m h of each projection [T, ranks], as it acts."""
        return scaled

    def _merged(self, layer: int, target: str, rows: int, width: int) -> np.ndarray:
        """An attention weight [rows, width] with its LoRA merged in float32."""
        weight = self._get(f"model.layers.{layer}.self_attn.{target}.weight", rows, width)
        pair = self.adapter.attention(layer, target) if self.adapter else None
        if pair is None:
            return weight
        a, b = pair
        return weight + np.float32(self._molora.scale) * (b @ a)

    @property
    def _molora(self) -> MoLoRAConfig:
        assert self.adapter is not None  # callers have looked
        return self.adapter.config

    def _get(self, name: str, *shape: int) -> np.ndarray:
        array = self.source.get(name)
        if array.shape != shape:
            raise WeightsError(
                f"Base tensor {name} has shape {array.shape}; by the base's config.json it should be {shape}.",
                f"基座张量 {name} 的形状是 {array.shape}；按 config.json 应为 {shape}。",
            )
        return array

    def _bias(self, linear: str) -> np.ndarray | None:
        name = f"{linear}.bias"
        return self.source.get(name) if name in self._names else None

    def _check_names(self) -> None:
        """Refuses a base that lacks a tensor, or has one that the graph would leave out."""
        norms = ["input_layernorm", "post_attention_layernorm"]
        linears = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in PROJECTIONS]
        layers = [f"model.layers.{layer}." for layer in range(self.shape.layers)]
        needed = {p + f"{n}.weight" for p in layers for n in norms + linears}
        needed |= {"model.embed_tokens.weight", "model.norm.weight"}
        optional = {p + f"{n}.bias" for p in layers for n in linears} | {"lm_head.bias", "lm_head.weight"}
        if not self.shape.tied:
            needed.add("lm_head.weight")
        missing, extra = sorted(needed - self._names), sorted(self._names - needed - optional)
        for names, en, zh in ((missing, "lacks", "缺少"), (extra, "has, beyond a Qwen2 or Llama decoder,", "多出")):
            if names:
                some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
                raise WeightsError(
                    f"The ONNX engine cannot run this base: it {en} {some}. Use the torch backend.",
                    f"ONNX 引擎无法运行该基座：它{zh} {some}。请使用 torch 后端。",
                )


def _stacked(parts: Sequence[Callable[[], np.ndarray]]) -> np.ndarray:
    return np.concatenate([part() for part in parts])


@dataclass(frozen=True)
class RankRows:
    """Order of the rank rows of one projection: `lead` zeros, E r routed (expert-major), the shared ones, `tail` zeros.

    The zeros fill quantisation blocks, so that none mixes x, ranks and block sums: their sizes differ much.
    """

    lead: int
    experts: int
    rank: int
    shared: int
    tail: int

    @classmethod
    def of(cls, config: MoLoRAConfig, width: int, fmt: Format, *, whole: bool) -> RankRows:
        """For a projection of `width` inputs stored in `fmt`; `whole`: something follows, so the last block is filled."""
        shared = config.num_shared_experts * config.rank
        used = config.num_experts * config.rank + shared
        return cls(-width % fmt.block, config.num_experts, config.rank, shared, -used % fmt.block if whole else 0)

    @property
    def size(self) -> int:
        return self.lead + self.experts * self.rank + self.shared + self.tail

    def stack_a(self, weights: ProjectionWeights) -> np.ndarray:
        """Float32 [size, in]."""
        width = weights.A.shape[2]
        shared = weights.shared_A if weights.shared_A is not None else np.zeros((0, width), np.float32)
        zeros = [np.zeros((n, width), np.float32) for n in (self.lead, self.tail)]
        return np.concatenate([zeros[0], weights.A.reshape(-1, width), shared, zeros[1]])

    def stack_b(self, weights: ProjectionWeights, scale: float) -> np.ndarray:
        """Float32 [out, size], times s."""
        rows = weights.B.shape[1]
        shared = weights.shared_B if weights.shared_B is not None else np.zeros((rows, 0), np.float32)
        zeros = [np.zeros((rows, n), np.float32) for n in (self.lead, self.tail)]
        routed = weights.B.transpose(1, 0, 2).reshape(rows, -1)
        return np.concatenate([zeros[0], routed, shared, zeros[1]], axis=1) * np.float32(scale)

    def spread(self, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Matrix [slots E, slots size] and row [slots size]: gate @ matrix + row is the factor of every rank row."""
        one = np.zeros((self.experts, self.size), np.float32)
        one[:, self.lead : self.lead + self.experts * self.rank] = np.repeat(np.eye(self.experts), self.rank, axis=1)
        always = np.zeros(self.size, np.float32)
        always[self.size - self.tail - self.shared : self.size - self.tail] = 1
        return np.kron(np.eye(slots, dtype=np.float32), one), np.tile(always, slots)
