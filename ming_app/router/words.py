"""What the panel and the views of a trace say, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping

WORDS: Mapping[str, tuple[str, str]] = {
    "expert": ("expert", "专家"),
    "layer": ("layer", "层"),
    "matrix": ("matrix", "矩阵"),
    "share": ("share", "占比"),
    "low": ("chance, low", "随机下限"),
    "high": ("chance, high", "随机上限"),
    "outside": ("beyond chance", "超出随机"),
    "gini": ("Gini", "基尼系数"),
    "entropy": ("entropy", "熵"),
    "yes": ("yes", "是"),
    "token": ("token", "词元"),
    "times": ("times", "次数"),
    "usual": ("usual share", "平均占比"),
    "contexts": ("after different tokens", "前接不同词元数"),
    "lift": ("times the usual", "为平均的倍数"),
    "tokens": ("tokens", "词元数"),
    "divergence": ("divergence (bits)", "散度（比特）"),
    "chance": ("by chance", "随机"),
    "chance_high": ("by chance, 95th percentile", "随机，第 95 百分位"),
    "from": ("from", "来自"),
    "to": ("to", "去往"),
    "overlap": ("experts in common", "共同专家"),
    "moved": ("weight moved", "权重变化"),
    "aligned": ("place in A, B", "A、B 中的位置"),
    "load.title": ("Load of the experts", "专家负载"),
    "load.note": (
        "Share of all choices that fell on each expert, {scope}, {tokens} tokens; even use is {even}. • marks shares outside the middle 95 % of what experts without preferences would show on these very tokens. {dead}",
        "各专家在全部选择中的占比（{scope}，{tokens} 个词元）；均匀时为 {even}。• 表示该占比超出“无偏好专家”在同样词元上的 95% 区间。{dead}",
    ),
    "load.dead": (
        "Chosen for less than 1 % of the choices: {names}.",
        "被选比例不足 1%：{names}。",
    ),
    "load.none_dead": ("No expert gets less than 1 %.", "没有专家低于 1%。"),
    "load.cell": ("layer {layer} {matrix}: {experts}", "第 {layer} 层 {matrix}：{experts}"),
    "spec.title": ("Do groups of tokens use different experts? By {kind}", "不同组别的词元是否使用不同专家？按{kind}"),
    "spec.note": (
        "Jensen-Shannon divergence between the groups' expert distributions, against the same with labels dealt out at random ({unit}). {beyond} of the {cells} routers lie beyond the 95th percentile of chance; 5 % would mean nothing. At most {largest} bits are possible here. Below: which experts each group uses in layer {layer}.",
        "各组专家分布之间的 Jensen-Shannon 散度，并与随机打乱标签（{unit}）的结果比较。{cells} 个路由器中有 {beyond} 超出随机的第 95 百分位；若为 5% 则毫无意义。此处的上限为 {largest} 比特。下图：各组在第 {layer} 层使用的专家。",
    ),
    "spec.by_text": ("whole texts at a time", "以整段文本为单位"),
    "spec.by_token": ("distinct tokens at a time, with all their occurrences", "以不同词元（连同其所有出现）为单位"),
    "vocab.title": ("Tokens each expert takes far above its usual share", "各专家明显偏爱的词元"),
    "vocab.note": (
        "Tokens seen at least {seen} times, after {contexts} different tokens or more, at which an expert was chosen {rate} of the time and {lift} times as often as over all tokens, or more ({scope}). A description, not a test: a token's id alone decides much of its route.",
        "至少出现 {seen} 次、前接至少 {contexts} 种不同词元，且选中某专家的比例不低于 {rate}、并不低于其总体水平 {lift} 倍的词元（{scope}）。这只是描述而非检验：词元编号本身就在很大程度上决定路由。",
    ),
    "together.title": ("Which experts are chosen together", "哪些专家常被同时选中"),
    "together.note": (
        "Of the tokens that chose the row's expert, the share that chose the column's too ({scope}). Were all pairs alike, {even} would stand everywhere.",
        "在选中该行专家的词元中，同时选中该列专家的比例（{scope}）。若各对概率相同，则处处为 {even}。",
    ),
    "flow.title": ("From layer to layer: the top expert of each token", "逐层流向：每个词元的首选专家"),
    "flow.note": (
        "How many tokens go from which top expert to which, layers {first} to {last}, {matrix}. Experts of different layers have nothing in common but their number.",
        "第 {first} 至 {last} 层 {matrix} 中，词元在相邻层首选专家之间的流动数量。不同层的同号专家之间没有任何联系。",
    ),
    "alike.title": ("How alike the experts are", "专家之间有多相似"),
    "alike.note": (
        "Cosine between the updates B A of two experts ({scope}): 0 is unrelated, 1 the same direction. Of the weights alone, whatever the text.",
        "两个专家的更新矩阵 B A 之间的余弦（{scope}）：0 表示无关，1 表示方向相同。仅取决于权重，与文本无关。",
    ),
    "compare.title": ("What differs between the two", "两者的差异"),
    "compare.note": (
        "{pairs} tokens stand in both ({only_a} only in A, {only_b} only in B). In {same} of their routers the same experts were chosen. Colour: how much of the weight went to other experts, mean of gate, up and down.",
        "共有 {pairs} 个词元同时出现（仅 A {only_a} 个，仅 B {only_b} 个）。其中 {same} 的路由器选择了相同的专家。颜色：转移到其他专家的权重比例（gate、up、down 的平均）。",
    ),
    "contribution.title": ("How much the experts add", "专家实际贡献了多少"),
    "contribution.note": (
        "Length of what an expert adds over the length of the frozen matrix's own output, mean over the tokens that chose it. A weight of 60 % says little when the expert adds a hundredth of the base.",
        "专家所加向量与冻结矩阵自身输出的长度之比，对选中它的词元取平均。若专家只加上基座的百分之一，60% 的权重也说明不了什么。",
    ),
    "kind.role": ("part of the conversation", "对话部分"),
    "kind.class": ("kind of token", "词元类型"),
    "kind.part": ("part of the exam question", "试题部分"),
    "kind.language": ("language", "语言"),
    "kind.stream": ("kind of text", "文本类型"),
    "kind.domain": ("subject", "学科"),
    "name.prompt": ("question", "问题"),
    "name.answer": ("answer", "回答"),
    "name.han": ("Chinese characters", "汉字"),
    "name.latin": ("Latin letters", "拉丁字母"),
    "name.digit": ("digits", "数字"),
    "name.punctuation": ("punctuation", "标点"),
    "name.space": ("spaces", "空白"),
    "name.special": ("control tokens", "控制符"),
    "name.other": ("other", "其他"),
    "name.question": ("question", "题干"),
    "name.options": ("options", "选项"),
    "name.zh": ("Chinese", "中文"),
    "name.en": ("English", "英文"),
    "scope.all": ("all layers and matrices", "所有层与矩阵"),
    "scope.layer": ("layer {layer}, {matrix}", "第 {layer} 层 {matrix}"),
    "scope.matrix": ("{matrix}, all layers", "{matrix}，所有层"),
    "caution": (
        "Read with care: experts share out mostly word forms, scripts and syntax. They have numbers, not medical fields, and a few texts prove little.",
        "请谨慎解读：专家的分工多与词形、文字和句法有关。它们只有编号，不对应医学专科；少量文本说明不了什么。",
    ),
    "table": ("As a table", "以表格显示"),
    "report.title": ("How the experts of {model} route", "{model} 的专家路由"),
    "report.made": (
        "{tokens} tokens of {texts} texts, {layers} layers, {experts} experts, {k} per token. Read by the model as served ({precision}). Texts of the assistant in it are AI-generated.",
        "{texts} 段文本，共 {tokens} 个词元；{layers} 层，{experts} 个专家，每词元 {k} 个。由实际服务的模型读取（{precision}）。其中助手文本由人工智能生成。",
    ),
    "report.texts": ("Texts", "文本"),
    "report.text": ("text", "文本"),
}


PANEL: Mapping[str, tuple[str, str]] = {
    "agree": ("agreement of gate, up and down", "gate、up、down 的一致性"),
    "agree_hint": (
        "Of up and down, how many (0 to 2) put a token where gate does. Numbers of different matrices mean nothing to each other: experts are paired by how often they are chosen together in this text.",
        "up 与 down 中有几个（0 到 2）与 gate 对该词元的归属一致。不同矩阵的专家编号互不相关，此处按本文中共同被选中的频率配对。",
    ),
    "title": ("Experts at work", "专家在工作"),
    "empty": (
        "Ask a question: every token of the answer appears here, coloured by the expert that takes it.",
        "提问后，回答的每个词元都会显示在这里，并按处理它的专家着色。",
    ),
    "no_adapter": (
        "The model runs without its expert adapter, so there is no routing to show. Start it with the bundled adapter to see the experts.",
        "当前模型未加载专家适配器，因此没有路由可显示。请使用自带的适配器启动，即可查看专家。",
    ),
    "live": ("live", "实时"),
    "counts": (
        "{tokens} tokens · {layers} layers · {experts} experts, {k} per token",
        "{tokens} 个词元 · {layers} 层 · {experts} 个专家，每词元 {k} 个",
    ),
    "what": ("What am I looking at?", "这里显示的是什么？"),
    "what_1": (
        "The base model is frozen. In each layer, three of its matrices (gate, up and down of the feed-forward part) carry small add-ons called LoRA experts. For every token a router scores the {experts} experts of a matrix, and the best {k} add their correction, weighted. This is a sparse mixture of LoRA experts.",
        "基础模型保持不变。每一层的前馈部分有三个矩阵（gate、up、down），每个矩阵上挂着若干个小的附加模块，称为 LoRA 专家。对每个词元，路由器给该矩阵的 {experts} 个专家打分，得分最高的 {k} 个按权重叠加各自的修正。这就是“稀疏 LoRA 专家混合”。",
    ),
    "what_2": (
        "Colour and number name the expert with the highest score, strength its weight. Choose a layer and a matrix; choose a token to see all its experts. Experts have numbers, not subjects: what they share out is mostly word forms and syntax, so nobody should read a medical speciality into a number.",
        "颜色和数字表示得分最高的专家，深浅表示其权重。可选择层和矩阵；点选一个词元可查看它在各层的全部专家。专家只有编号，没有科室：它们的分工大多与词形和句法有关，请勿把编号理解为某个医学专科。",
    ),
    "fig_token": ("token", "词元"),
    "fig_router": ("router", "路由器"),
    "fig_base": ("frozen matrix", "冻结的矩阵"),
    "projection": ("Matrix", "矩阵"),
    "layer": ("Layer", "层"),
    "prompt": ("Show the question too", "同时显示问题"),
    "tokens": ("Tokens", "词元"),
    "tokens_hint": (
        "Colour and number: top expert in layer {layer}, {projection}. Choose a token, or move with the arrow keys.",
        "颜色与数字：第 {layer} 层 {projection} 中得分最高的专家。点选词元，或用方向键移动。",
    ),
    "question_part": ("Question", "问题"),
    "answer_part": ("Answer", "回答"),
    "map": ("Layers × tokens", "层 × 词元"),
    "map_hint": (
        "Each column is a token, each row a layer. Arrow keys move, Enter opens the token.",
        "每列一个词元，每行一层。方向键移动，回车查看该词元。",
    ),
    "zoom_in": ("Zoom in", "放大"),
    "zoom_out": ("Zoom out", "缩小"),
    "zoom_fit": ("Fit", "适应宽度"),
    "detail": ("One token", "单个词元"),
    "detail_none": (
        "Choose a token above to see its experts in every layer.",
        "在上方点选一个词元，查看它在每一层的专家。",
    ),
    "token_id": ("token {id}", "词元编号 {id}"),
    "probability": ("probability {p}", "概率 {p}"),
    "others": ("likeliest here: {list}", "此处最可能：{list}"),
    "added": ("adds {list} · H {entropy}", "贡献 {list} · H {entropy}"),
    "position": ("position {n}", "第 {n} 个"),
    "load": ("Load", "负载"),
    "load_hint": (
        "Share of all choices that fell on each expert, {scope}. The line marks even use ({uniform}).",
        "各专家被选中的比例（{scope}）。竖线为均匀使用（{uniform}）。",
    ),
    "scope_layer": ("layer {layer}, {projection}", "第 {layer} 层 {projection}"),
    "scope_all": ("all layers and matrices", "所有层与矩阵"),
    "scope_switch": ("All layers and matrices", "所有层与矩阵"),
    "expert": ("Expert {e}", "专家 {e}"),
    "table": ("Show as a table", "以表格显示"),
    "table_caption": ("Experts and weights per token in layer {layer}", "第 {layer} 层各词元的专家与权重"),
    "col_token": ("Token", "词元"),
    "col_part": ("Part", "部分"),
    "legend": ("Experts:", "专家："),
    "space": ("space", "空格"),
    "newline": ("line break", "换行"),
    "part_of": ("{n} tokens form this character", "由 {n} 个词元组成一个字符"),
    "say": ("{token}, layer {layer}, {projection}: {experts}", "{token}，第 {layer} 层，{projection}：{experts}"),
}
"""Words of the panel, which fills in {placeholders} itself."""


def panel_words(lang: str) -> dict[str, str]:
    """All of PANEL in one language, for the browser."""
    return {key: texts[1 if lang.startswith("zh") else 0] for key, texts in PANEL.items()}


def say(lang: str, key: str, **values: object) -> str:
    """The text of `key`; values are inserted with str.format. KeyError for a key that is not there."""
    text = WORDS[key][1 if lang.startswith("zh") else 0]
    return text.format(**values) if values else text


def name_of(lang: str, kind: str, name: str) -> str:
    """A group's name for people; labels of a person's own stay as they are."""
    key = f"{kind}.{name}"
    return say(lang, key) if key in WORDS else name


def percent(share: float) -> str:
    """12 %, 3.4 % below ten."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.1f} %"
