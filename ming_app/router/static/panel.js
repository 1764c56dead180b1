// The expert panel: state, controls and views, kept in step with the payload that streams in. Runs inside gr.HTML's
// js_on_load (element, props, watch), after panel_data.js and panel_map.js. What a person chose (token, layer, matrix,
// scroll position) survives every update; a new answer only drops the chosen token.

const $ = (selector) => element.querySelector(selector);
const PROJECTIONS = ["gate", "up", "down"];
const trace = new Trace();
const view = { projection: 0, layer: 0, token: null, prompt: false, table: false, all: false, agree: false, settled: false };
const map = new HeatMap($(".xp-map"), trace, view, (token, layer) => pick(token, layer));
const prefix = `xp${Math.random().toString(36).slice(2, 8)}`;
let words = {};

const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const say = (key, values = {}) => (words[key] || "").replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
const percent = (share) => `${Math.round(share * 100)}%`;
const experts = (pairs) => pairs.map(([e, w]) => `${say("expert", { e })} ${percent(w)}`).join(", ");
const quoted = (text) => (text.trim() ? shown(text).trim() : text.includes("\n") ? say("newline") : text ? say("space") : "·");
const tint = (made, expert, strength) => {
  made.style.setProperty("--c", `var(--x${expert % 8})`);
  made.style.setProperty("--s", strength.toFixed(3));
  made.classList.toggle("xp-striped", expert >= 8);
};

// -- words and frame ------------------------------------------------------------------------------------------------

function frame() {
  counts();
  const { layers, experts: E, k } = trace.head, known = { layers, experts: E || "E", k: k || "k", tokens: trace.size };
  for (const made of element.querySelectorAll("[data-t]")) made.textContent = say(made.dataset.t, known);
  $(".xp").setAttribute("aria-label", say("title"));
  $(".xp-what-1").textContent = say("what_1", known);
  $(".xp-what-2").textContent = say("what_2", known);
  $(".xp-strip").setAttribute("aria-label", say("tokens"));
  $(".xp-map-hint").textContent = say(view.agree ? "agree_hint" : "map_hint");
  $(".xp-map").setAttribute("aria-label", `${say("map")}. ${$(".xp-map-hint").textContent}`);
  $(".xp-table").setAttribute("aria-label", say("table_caption", { layer: view.layer }));
  for (const [name, key] of [["in", "zoom_in"], ["out", "zoom_out"]]) $(`.xp-${name}`).setAttribute("aria-label", say(key)), ($(`.xp-${name}`).title = say(key));
  $(".xp-layer output").textContent = view.layer;
  $(".xp-layer input").max = Math.max(0, layers - 1);
  $(".xp-layer input").value = view.layer;
  $(".xp-tokens-hint").textContent = say("tokens_hint", { layer: view.layer, projection: PROJECTIONS[view.projection] });
  legend(E);
}

// What changes with every update of a stream; `frame` is for another answer, layer, matrix or language.
function counts() {
  const { state, layers, experts: E, k } = trace.head, some = trace.size > 0;
  $(".xp-empty").textContent = say(state === "no_adapter" ? "no_adapter" : "empty");
  $(".xp-empty").hidden = some;
  $(".xp-body").hidden = !some;
  $(".xp-counts").textContent = some ? say("counts", { layers, experts: E, k, tokens: trace.size }) : "";
  $(".xp-live").hidden = state !== "live";
}

function legend(E) {
  const made = $(".xp-legend");
  made.replaceChildren(node("span", "", say("legend")));
  for (let e = 0; e < Math.min(E, 64); e++) {
    const chip = node("span", "xp-chip", e);
    tint(chip, e, 1);
    chip.setAttribute("aria-label", say("expert", { e }));
    made.append(chip);
  }
}

// -- token strip ----------------------------------------------------------------------------------------------------

const strip = $(".xp-strip");
let spans = [];

function paint(made, piece) {
  const token = piece.tokens[piece.tokens.length - 1];
  if (token >= trace.size) return;
  const chosen = trace.chosen(token, view.layer, view.projection);
  tint(made, chosen[0][0], trace.strength(token, view.layer, view.projection));
  made.lastChild.textContent = chosen[0][0];
  made.setAttribute("aria-label", `${quoted(piece.text)}: ${experts(chosen)}`);
}

function addSpans() {
  const atEnd = strip.scrollTop + strip.clientHeight >= strip.scrollHeight - 12;
  const fresh = document.createDocumentFragment();
  for (let i = spans.length; i < trace.pieces.length; i++) {
    const piece = trace.pieces[i], made = node("span", `xp-tok ${piece.answer ? "" : "xp-q"}`);
    made.id = `${prefix}-${i}`;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", "false");
    made.dataset.i = i;
    made.append(node("span", "xp-text", shown(piece.text) || "·"), node("sub", "", ""));
    paint(made, piece);
    spans.push(made);
    fresh.append(made);
    if (piece.text.includes("\n")) fresh.append(node("br", piece.answer ? "" : "xp-q"));
  }
  strip.append(fresh);
  if (atEnd && trace.head.state === "live") strip.scrollTop = strip.scrollHeight;
}

function repaint() {
  spans.forEach((made, i) => paint(made, trace.pieces[i]));
}

// -- choosing -------------------------------------------------------------------------------------------------------

function pick(token, layer = view.layer, projection = view.projection) {
  const moved = layer !== view.layer || projection !== view.projection;
  Object.assign(view, { token, layer, projection });
  if (moved) lookAnew();
  mark();
  detail();
  map.show(token);
  map.schedule();
  const chosen = trace.chosen(token, layer, projection), piece = trace.pieces[trace.tokens[token].at];
  $(".xp-say").textContent = say("say", { token: quoted(piece.text), layer, projection: PROJECTIONS[projection], experts: experts(chosen) });
}

function mark() {
  strip.querySelectorAll('[aria-selected="true"]').forEach((made) => made.setAttribute("aria-selected", "false"));
  if (view.token === null) return strip.removeAttribute("aria-activedescendant");
  const made = spans[trace.tokens[view.token].at];
  made.setAttribute("aria-selected", "true");
  strip.setAttribute("aria-activedescendant", made.id);
  if (made.offsetTop < strip.scrollTop) strip.scrollTop = made.offsetTop - 8;
  else if (made.offsetTop + made.offsetHeight > strip.scrollTop + strip.clientHeight) strip.scrollTop = made.offsetTop + made.offsetHeight - strip.clientHeight + 8;
}

// After another layer or projection was chosen.
function lookAnew() {
  trigger("select", { value: JSON.stringify({ layer: view.layer, projection: view.projection }) });
  for (const input of element.querySelectorAll(".xp-seg input")) input.checked = +input.value === view.projection;
  frame();
  repaint();
  detail();
  load();
  table(true);
  map.schedule();
}

function keys(event, byPiece) {
  const first = view.prompt ? 0 : trace.split, last = trace.size - 1;
  if (last < first) return;
  const at = view.token ?? (event.key === "ArrowLeft" || event.key === "End" ? last + 1 : first - 1);
  const across = (by) => {
    if (!byPiece || view.token === null) return at + by;
    const piece = trace.pieces[trace.tokens[view.token].at + by];
    return piece ? piece.tokens[piece.tokens.length - 1] : view.token;
  };
  const moves = {
    ArrowLeft: () => [across(-1), view.layer], ArrowRight: () => [across(1), view.layer],
    ArrowUp: () => [Math.max(at, first), view.layer - 1], ArrowDown: () => [Math.max(at, first), view.layer + 1],
    Home: () => [first, view.layer], End: () => [last, view.layer],
  };
  if (event.key === "Enter" && view.token !== null) {
    $(".xp-detail").focus();
    $(".xp-detail").scrollIntoView({ block: "nearest" });
  } else if (moves[event.key]) {
    const [token, layer] = moves[event.key]();
    pick(Math.max(first, Math.min(last, token)), Math.max(0, Math.min(trace.head.layers - 1, layer)));
  } else return;
  event.preventDefault();
}

// -- one token ------------------------------------------------------------------------------------------------------

function detail() {
  const box = $(".xp-detail");
  if (view.token === null || view.token >= trace.size) return box.replaceChildren(node("p", "xp-hint", say("detail_none")));
  const token = trace.tokens[view.token], piece = trace.pieces[token.at], head = node("p", "xp-token-head");
  head.append(node("b", "", quoted(piece.text)), node("span", "", say("position", { n: view.token })), node("span", "", say("token_id", { id: token.id })));
  if (token.logprob !== null) head.append(node("span", "", say("probability", { p: `${(Math.exp(token.logprob) * 100).toFixed(1)}%` })));
  head.append(node("span", "", say(piece.answer ? "answer_part" : "question_part")));
  if (piece.tokens.length > 1) {
    const parts = node("span", "xp-parts", `${say("part_of", { n: piece.tokens.length })}: `);
    for (const index of piece.tokens) {
      const button = node("button", index === view.token ? "xp-on" : "", trace.tokens[index].id);
      button.type = "button";
      button.onclick = () => pick(index);
      parts.append(button);
    }
    head.append(parts);
  }
  if (token.others.length) head.append(node("span", "xp-others", say("others", { list: token.others.map(([text, p]) => `${quoted(text)} ${(Math.exp(p) * 100).toFixed(1)}%`).join(" · ") })));
  const kept = box.querySelector(".xp-scroll")?.scrollTop, scroll = node("div", "xp-scroll"), made = node("table", "xp-grid");
  made.append(headRow([say("layer"), ...PROJECTIONS]));
  const body = made.appendChild(node("tbody"));
  for (let layer = 0; layer < trace.head.layers; layer++) body.append(detailRow(layer));
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `${say("detail")}: ${quoted(piece.text)}`);
  scroll.append(made);
  box.replaceChildren(head, scroll);
  if (kept !== undefined) scroll.scrollTop = kept;
  const row = body.children[view.layer];
  if (row.offsetTop < scroll.scrollTop + 30 || row.offsetTop + row.offsetHeight > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = row.offsetTop - scroll.clientHeight / 2;
}

function detailRow(layer) {
  const row = node("tr", layer === view.layer ? "xp-on" : ""), side = node("th", "", layer);
  side.scope = "row";
  row.append(side);
  PROJECTIONS.forEach((_, projection) => {
    const cell = node("td", layer === view.layer && projection === view.projection ? "xp-on" : ""), bars = node("div", "xp-bars");
    for (const [e, w] of trace.chosen(view.token, layer, projection)) {
      const bar = node("span", "xp-bar");
      tint(bar, e, 1);
      bar.style.flexGrow = Math.max(w, 0.02).toFixed(3);
      bar.style.setProperty("--w", w.toFixed(3));
      bar.append(node("b", "", e), node("i", "", percent(w)));
      bar.title = `${say("expert", { e })} ${percent(w)}`;
      bars.append(bar);
    }
    cell.append(bars);
    const added = trace.added(view.token, layer, projection), entropy = trace.entropy(view.token, layer, projection);
    if (added) cell.append(node("span", "xp-added", say("added", { list: added.map((share) => `${(share * 100).toFixed(1)}%`).join(" · "), entropy: entropy === null ? "–" : entropy.toFixed(2) })));
    cell.onclick = () => pick(view.token, layer, projection);
    row.append(cell);
  });
  return row;
}

function headRow(texts) {
  const head = node("thead"), row = head.appendChild(node("tr"));
  for (const text of texts) row.appendChild(node("th", "", text)).scope = "col";
  return head;
}

// -- load and table -------------------------------------------------------------------------------------------------

function load() {
  const { experts: E } = trace.head, box = $(".xp-load"), from = view.prompt ? 0 : trace.split;
  const shares = trace.load(from, view.all ? null : view.layer, view.projection), top = Math.max(2 / Math.max(E, 1), ...shares) * 1.05;
  const scope = view.all ? say("scope_all") : say("scope_layer", { layer: view.layer, projection: PROJECTIONS[view.projection] });
  $(".xp-load-hint").textContent = say("load_hint", { scope, uniform: `1/${E} = ${percent(1 / Math.max(E, 1))}` });
  box.style.setProperty("--u", `${(100 / E / top).toFixed(2)}%`);
  while (box.children.length > E) box.lastChild.remove();
  while (box.children.length < E) {
    const e = box.children.length, row = node("div", "xp-load-row"), chip = node("span", "xp-chip", e), track = node("div", "xp-track");
    tint(chip, e, 1);
    track.append(node("div", "xp-fill"));
    tint(track.firstChild, e, 1);
    row.append(chip, track, node("span", "xp-share"));
    box.append(row);
  }
  shares.forEach((share, e) => {
    const row = box.children[e];
    row.querySelector(".xp-fill").style.width = `${((share / top) * 100).toFixed(2)}%`;
    row.querySelector(".xp-share").textContent = `${(share * 100).toFixed(1)}%`;
    row.dataset.share = share.toFixed(6);
    row.setAttribute("aria-label", `${say("expert", { e })}: ${(share * 100).toFixed(1)}%`);
  });
}

// The table twin. Grows with the stream; `anew` rewrites it (another layer, language or answer).
function table(anew) {
  const box = $(".xp-table");
  box.hidden = !view.table;
  $(".xp-views").hidden = view.table;
  if (!view.table) return;
  let body = box.querySelector("tbody");
  if (anew || !body) {
    const made = node("table", "xp-twin");
    made.append(node("caption", "", say("table_caption", { layer: view.layer })));
    made.append(headRow(["#", say("col_token"), say("col_part"), ...PROJECTIONS]));
    body = made.appendChild(node("tbody"));
    body.dataset.next = view.prompt ? 0 : trace.split;
    box.replaceChildren(made);
  }
  for (let t = +body.dataset.next; t < trace.size; t++) {
    const row = body.appendChild(node("tr")), token = trace.tokens[t];
    row.append(node("td", "", t), node("th", "", quoted(token.text)), node("td", "", say(token.answer ? "answer_part" : "question_part")));
    row.children[1].scope = "row";
    PROJECTIONS.forEach((_, p) => row.append(node("td", "", trace.chosen(t, view.layer, p).map(([e, w]) => `${e} (${percent(w)})`).join(", "))));
    body.dataset.next = t + 1;
  }
}

// -- updates and controls -------------------------------------------------------------------------------------------

function update() {
  const payload = props.value;
  if (!payload || typeof payload !== "object") return;
  if (trace.take(payload)) {
    if (payload.layers && !view.settled) $(".xp-what").open = false; // the first answer takes the place of the explanation
    spans = [];
    strip.replaceChildren();
    if (!view.settled || view.layer >= payload.layers) view.layer = payload.layers >> 1; // the middle, until someone chooses
    view.settled = payload.layers > 0;
    view.token = null;
    if (trace.mixed) withQuestion(true); // there is no one answer to show alone
    map.follow = true;
    map.box.scrollLeft = 0;
    frame();
    detail();
    table(true);
  }
  addSpans();
  counts();
  load();
  table(false);
  map.layout();
}

function withQuestion(on) {
  view.prompt = $(".xp-prompt input").checked = on;
  $(".xp").classList.toggle("xp-with-question", on);
}

function speak() {
  words = JSON.parse(props.words || "{}");
  frame();
  repaint();
  detail();
  load();
  table(true);
}

element.querySelectorAll(".xp-seg input").forEach((input) => {
  input.name = prefix;
  input.onchange = () => { view.projection = +input.value; lookAnew(); };
});
$(".xp-layer input").oninput = (event) => { view.layer = +event.target.value; lookAnew(); };
$(".xp-prompt input").onchange = (event) => {
  withQuestion(event.target.checked);
  map.layout();
  load();
  table(true);
};
$(".xp-astable input").onchange = (event) => { view.table = event.target.checked; table(true); map.layout(); };
$(".xp-agree input").onchange = (event) => { view.agree = event.target.checked; frame(); map.schedule(); };
$(".xp-scope input").onchange = (event) => { view.all = event.target.checked; load(); };
$(".xp-in").onclick = () => map.zoom(1);
$(".xp-out").onclick = () => map.zoom(-1);
$(".xp-fit").onclick = () => map.fit();
strip.onclick = (event) => {
  const made = event.target.closest(".xp-tok");
  if (made) pick(trace.pieces[+made.dataset.i].tokens.at(-1));
};
strip.onkeydown = (event) => keys(event, true);
map.box.onkeydown = (event) => keys(event, false);
map.box.onmousemove = (event) => {
  const cell = map.cellAt(event), tip = $(".xp-tip");
  tip.hidden = !cell;
  if (!cell) return;
  const chosen = trace.chosen(cell.token, cell.layer, view.projection);
  tip.textContent = say("say", { token: quoted(trace.tokens[cell.token].text), layer: cell.layer, projection: PROJECTIONS[view.projection], experts: experts(chosen) });
  const area = element.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX - area.left + 12, area.width - 230)}px`;
  tip.style.top = `${event.clientY - area.top + 14}px`;
};
map.box.onmouseleave = () => { $(".xp-tip").hidden = true; };
new MutationObserver(() => map.schedule()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
watch("value", update);
watch("words", speak);
speak();
update();
