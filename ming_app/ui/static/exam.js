// The exam card: one question, the answer sheet and the clock. Runs inside gr.HTML's js_on_load (element, props, watch,
// trigger). The server decides; what a person does is shown at once and set right by its answer. Every action carries a
// number, and an answer to an earlier action than the last is not shown. All text goes in as text, never as markup.

const $ = (selector) => element.querySelector(selector);
const LETTERS = "ABCDEFGHIJ";
const CAUSES = ["knowledge", "misread", "reasoning", "time"];
const SURE = ["sure", "unsure", "guess"];
const PATIENCE = 10000; // milliseconds
let words = {}, now = { open: false }, seq = 0, ends = null, shownKey = "", asking = false, noteTimer = null;

const say = (key, values = {}) => (words[key] || "").replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  if (tag === "button") made.type = "button";
  return made;
};
const put = (selector, text) => { const made = $(selector); made.textContent = text; made.hidden = !text; };
// Actions go one after the other: the next when the answer to the one before is there (or does not come).
const waiting = [];
let busy = null;
const send = (action, value = null, index = now.index) => {
  waiting.push({ do: action, seq: ++seq, index, value });
  next();
};
function next() {
  if (busy || !waiting.length) return;
  busy = setTimeout(() => { busy = null; next(); }, PATIENCE);
  trigger("select", { value: JSON.stringify(waiting.shift()) });
}

// -- drawing --------------------------------------------------------------------------------------------------------

function draw() {
  $(".ex").hidden = !now.open;
  document.documentElement.classList.toggle("ming-exam-open", !!now.open);
  if (!now.open) { shownKey = ""; return; }
  $(".ex-title").textContent = now.title;
  $(".ex-counter").textContent = say("question", { i: now.index + 1, n: now.count });
  put(".ex-error", now.error);
  put(".ex-notice", now.notice);
  $(".ex-finish").textContent = say(now.kind === "mock" ? "finish" : "end");
  $(".ex-finish").hidden = $(".ex-leave").hidden = now.finished;
  $(".ex-leave").textContent = say(now.kind === "mock" && !now.paused ? "leave_mock" : "leave");
  $(".ex-pause").hidden = !now.pausable || now.finished;
  $(".ex-pause").textContent = say(now.paused ? "resume" : "pause");
  $(".ex-stand").hidden = !now.paused;
  $(".ex-body").hidden = now.paused;
  confirmation();
  sheet();
  question();
  clock();
}

function question() {
  const q = now.question;
  $(".ex-main").hidden = !q;
  if (!q) return;
  const meta = [q.kind, ...q.tags];
  if (q.part) meta.push(say("part", { i: q.part[0], n: q.part[1] }));
  if (q.shared) meta.push(say("shared", { n: q.shared }));
  $(".ex-meta").textContent = meta.join(" · ");
  $(".ex-main").lang = q.lang === "zh" ? "zh-CN" : "en";
  $(".ex-case").hidden = !q.case && !q.told.length;
  $(".ex-case-text").textContent = q.case;
  $(".ex-told").replaceChildren(...q.told.map((text) => node("li", "", text)));
  $(".ex-stem").textContent = q.stem;
  const image = $(".ex-image");
  image.hidden = !q.image;
  if (q.image) { image.src = q.image; image.alt = say("image"); } else image.removeAttribute("src");
  put(".ex-hint", q.locks ? say("locks") : q.multiple && !q.final ? say("several") : "");
  options(q);
  verdict(q);
  choices(".ex-sure", SURE, "", q.confidence, q.final, (value) => { q.confidence = value; send("rate", value); });
  $(".ex-sure").hidden = q.final && !q.confidence;
  $(".ex-flag").textContent = (q.flagged ? "⚑ " : "⚐ ") + say(q.flagged ? "flagged" : "flag");
  $(".ex-flag").setAttribute("aria-pressed", q.flagged);
  $(".ex-previous").disabled = now.index === 0;
  $(".ex-next").disabled = now.index === now.count - 1;
  const submit = $(".ex-submit"), tutor = now.mode === "tutor" && !q.final;
  submit.hidden = !tutor;
  submit.disabled = !q.chosen;
  submit.textContent = say("submit");
  const area = $(".ex-note textarea");
  if (shownKey !== q.key) area.value = q.note;
  area.placeholder = say("note_hint");
  $(".ex-note").hidden = now.mode === "exam" && !now.finished;
  if (shownKey !== q.key && shownKey && !asking) $(".ex-stem").focus({ preventScroll: true });
  shownKey = q.key;
}

// Redraws without taking the focus away from the control that has it.
function keepingFocus(box, draw) {
  const at = box.contains(document.activeElement) ? document.activeElement : null, name = at?.className.split(" ")[0], value = at?.dataset.value;
  draw();
  if (at) [...box.querySelectorAll(`.${name}`)].find((made) => made.dataset.value === value)?.focus({ preventScroll: true });
}

function options(q) {
  keepingFocus($(".ex-options"), () => drawOptions(q));
}
function drawOptions(q) {
  const box = $(".ex-options"), key = q.revealed ? q.revealed.key : "", chances = q.revealed?.model?.chances || {};
  box.setAttribute("role", q.multiple ? "group" : "radiogroup");
  box.replaceChildren(...q.options.map(({ letter, text }, at) => {
    const row = node("div", "ex-option"), pick = node("button", "ex-pick");
    pick.dataset.value = letter;
    const chosen = q.chosen.includes(letter), struck = q.struck.includes(letter), right = key.includes(letter);
    pick.setAttribute("role", q.multiple ? "checkbox" : "radio");
    pick.setAttribute("aria-checked", chosen);
    pick.append(node("span", "ex-letter", LETTERS[at]), node("span", "ex-text", text));
    const told = [];
    if (q.revealed) {
      row.classList.toggle("ex-right", right);
      row.classList.toggle("ex-wrong", chosen && !right);
      if (right) told.push("✓ " + say("is_key"));
      if (chosen) told.push((right ? "" : "✗ ") + say("chosen"));
      if (q.revealed.model?.choice.includes(letter)) told.push(say("model"));
    }
    if (told.length) pick.append(node("span", "ex-told-marks", told.join(" · ")));
    if (letter in chances) {
      const bar = node("span", "ex-chance"), share = Math.round(chances[letter] * 100);
      bar.style.setProperty("--w", share + "%");
      bar.append(node("i"), node("b", "", share + "%"));
      bar.title = say("model");
      pick.append(bar);
    }
    row.classList.toggle("ex-chosen", chosen);
    row.classList.toggle("ex-struck", struck && !q.revealed);
    pick.disabled = q.final;
    pick.addEventListener("click", () => choose(letter));
    row.append(pick);
    if (!q.final) {
      const strike = node("button", "ex-strike", "⊘");
      strike.setAttribute("aria-label", say("strike", { letter: LETTERS[at] }));
      strike.title = strike.getAttribute("aria-label");
      strike.setAttribute("aria-pressed", struck);
      strike.dataset.value = letter;
      strike.addEventListener("click", () => {
        q.struck = struck ? q.struck.replace(letter, "") : q.struck + letter;
        send("strike", q.struck);
        draw();
      });
      row.append(strike);
    }
    return row;
  }));
}

function verdict(q) {
  const shown = q.revealed, made = $(".ex-verdict");
  made.hidden = !shown;
  $(".ex-after").hidden = !shown;
  if (!shown) return;
  const kind = shown.correct ? "right" : !q.chosen ? "unanswered" : shown.score > 0 ? "partly" : "wrong";
  made.className = `ex-verdict ex-is-${shown.correct ? "right" : "wrong"}`;
  made.textContent = `${say(kind)} · ${say("key", { letters: shown.shown })}`;
  const colon = document.documentElement.lang.startsWith("zh") ? "：" : ": ";
  $(".ex-explanation").textContent = shown.explanation || say("no_explanation");
  put(".ex-reference", shown.reference && `${say("reference")}${colon}${shown.reference}`);
  put(".ex-source", shown.source && `${say("source")}${colon}${shown.source}`);
  put(".ex-due", shown.due && say("due", { when: shown.due }));
  choices(".ex-cause", CAUSES, "cause_", q.cause, false, (value) => { q.cause = value; send("cause", value); });
  $(".ex-cause").hidden = shown.correct;
}

function choices(selector, values, prefix, chosen, locked, pick) {
  const box = $(selector), legend = box.querySelector("legend");
  keepingFocus(box, () => box.replaceChildren(legend, ...values.map((value) => {
    const made = node("button", "ex-chip", say(prefix + value));
    made.setAttribute("aria-pressed", value === chosen);
    made.dataset.value = value;
    made.disabled = locked;
    made.addEventListener("click", () => { pick(value === chosen ? "" : value); draw(); });
    return made;
  })));
}

function sheet() {
  const flags = new Set(now.flags), cells = $(".ex-cells"), states = [...now.sheet];
  while (cells.children.length > states.length) cells.lastChild.remove();
  while (cells.children.length < states.length) {
    const made = node("button", "", String(cells.children.length + 1)), at = cells.children.length;
    made.addEventListener("click", () => go(at));
    cells.append(made);
  }
  states.forEach((state, at) => {
    const cell = cells.children[at], name = `ex-cell ex-state-${state}${at === now.index ? " ex-here" : ""}${flags.has(at) ? " ex-flagged" : ""}`;
    if (cell.className === name) return;
    cell.className = name;
    cell.disabled = state === "4";
    if (at === now.index) cell.setAttribute("aria-current", "true"); else cell.removeAttribute("aria-current");
    cell.setAttribute("aria-label", [at + 1, say(`state_${state}`), flags.has(at) ? say("flagged") : ""].filter(Boolean).join(", "));
  });
  const counts = ["0", "1", "2", "3", "4"].map((state) => [state, states.filter((s) => s === state).length]).filter(([, n]) => n);
  $(".ex-sheet-legend").replaceChildren(...counts.map(([state, n]) => {
    const made = node("span");
    made.append(node("i", `ex-cell ex-state-${state}`), `${say(`state_${state}`)} ${n}`);
    return made;
  }));
  $(".ex-sheet").setAttribute("aria-label", say("sheet"));
}

// -- the clock ------------------------------------------------------------------------------------------------------

function clock() {
  const box = $(".ex-clock");
  box.hidden = now.left === null || now.left === undefined;
  if (box.hidden) return;
  const left = Math.max(0, now.paused ? now.left : (ends - Date.now()) / 1000), whole = Math.ceil(left);
  const two = (n) => String(n).padStart(2, "0"), hours = Math.floor(whole / 3600);
  const text = `${hours ? hours + ":" : ""}${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  if (box.querySelector("b").textContent !== text) box.querySelector("b").textContent = text;
  box.classList.toggle("ex-late", left < 300);
  const spoken = box.querySelector("[role=status]");
  if (whole === 300 || whole === 60) spoken.textContent = `${say("left")} ${text}`;
  if (!now.paused && left <= 0 && !clock.asked) { clock.asked = true; send("look"); }
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && element.isConnected && now.open && now.left != null) send("look"); });
setInterval(() => { if (now.open && now.left != null) clock(); }, 250);

// -- acting ---------------------------------------------------------------------------------------------------------

function choose(letter) {
  const q = now.question;
  if (!q || q.final) return;
  const on = q.chosen.includes(letter);
  q.chosen = q.multiple ? [...LETTERS].filter((x) => (x === letter ? !on : q.chosen.includes(x))).join("") : on ? "" : letter;
  if (now.sheet[now.index] < "2") now.sheet = now.sheet.slice(0, now.index) + (q.chosen ? "1" : "0") + now.sheet.slice(now.index + 1);
  send("choose", q.chosen);
  draw();
}
function go(index) {
  if (index < 0 || index >= now.count || index === now.index) return;
  keepNote();
  send("go", null, index);
}
function submit() {
  const q = now.question;
  if (!q || q.final || !q.chosen || q.submitting) return;
  q.submitting = true;
  keepNote();
  send("submit", q.chosen);
}
function flag() {
  const q = now.question;
  if (!q) return;
  q.flagged = !q.flagged;
  now.flags = q.flagged ? [...now.flags, now.index] : now.flags.filter((at) => at !== now.index);
  send("flag", q.flagged);
  draw();
}
function keepNote() {
  clearTimeout(noteTimer);
  const q = now.question, text = $(".ex-note textarea").value;
  if (q && text !== q.note) { q.note = text; send("note", text); }
}
function confirmation() {
  const missing = [...now.sheet].filter((state) => state === "0" || state === "4").length, box = $(".ex-confirm");
  if (now.finished) asking = false;
  box.hidden = !asking;
  box.querySelector("span").textContent = missing ? say("sure_finish", { n: missing }) : say("sure_end");
  $(".ex-yes").textContent = say("yes");
  $(".ex-no").textContent = say("no");
}

$(".ex-previous").addEventListener("click", () => go(now.index - 1));
$(".ex-next").addEventListener("click", () => go(now.index + 1));
$(".ex-submit").addEventListener("click", submit);
$(".ex-flag").addEventListener("click", flag);
$(".ex-leave").addEventListener("click", () => { keepNote(); send("leave"); });
$(".ex-pause").addEventListener("click", () => { keepNote(); send("pause", !now.paused); });
$(".ex-finish").addEventListener("click", () => { asking = true; draw(); $(".ex-yes").focus(); });
$(".ex-yes").addEventListener("click", () => { keepNote(); asking = false; send("finish"); });
$(".ex-no").addEventListener("click", () => { asking = false; draw(); $(".ex-finish").focus(); });
$(".ex-note textarea").addEventListener("input", () => { clearTimeout(noteTimer); noteTimer = setTimeout(keepNote, 800); });
$(".ex-note textarea").addEventListener("blur", keepNote);

// The button that goes on from here.
const forward = () => [".ex-submit", ".ex-next", ".ex-finish"].map($).find((made) => !made.hidden && !made.disabled);

// Keys of one character disturb those who speak to their computer: they can be switched off.
const OFF = "ming.exam.keys";
const letterKeys = () => { try { return localStorage.getItem(OFF) !== "off"; } catch { return true; } };
function keysSwitch() {
  const made = $(".ex-keys-switch"), on = letterKeys();
  made.textContent = say(on ? "keys_on" : "keys_off");
  made.setAttribute("aria-pressed", on);
}
$(".ex-keys-switch").addEventListener("click", () => {
  try { localStorage.setItem(OFF, letterKeys() ? "off" : "on"); } catch { /* a private window: they stay on */ }
  keysSwitch();
});

// Up and down walk through the options once the focus is among them; elsewhere they scroll the page.
function walk(step) {
  const picks = [...element.querySelectorAll(".ex-pick:not(:disabled)")];
  picks[(picks.indexOf(document.activeElement) + step + picks.length) % picks.length].focus();
}

// Keys, while the card is in view and nobody types. Enter on a button of ours is that button's.
document.addEventListener("keydown", (event) => {
  if (!element.isConnected || !now.open || now.paused || !element.offsetParent && !$(".ex").offsetParent) return;
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.keyCode === 229) return;
  const at = event.target;
  if (at.closest?.("input, textarea, select, [contenteditable], [role=listbox], [role=application], [role=slider]")) return;
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key, q = now.question;
  if (asking) {
    if (key === "Escape") $(".ex-no").click();
    return;
  }
  if (key.length === 1 && key !== " " && !letterKeys()) return;
  const number = LETTERS.indexOf(key) >= 0 ? LETTERS.indexOf(key) : "1234567890".indexOf(key);
  if (key === "F") flag();
  else if (q && number >= 0 && number < q.options.length) {
    choose(q.options[number].letter);
    forward()?.focus({ preventScroll: true }); // Enter then goes on, wherever the focus was
  }
  else if (key === "ArrowRight") go(now.index + 1);
  else if (key === "ArrowLeft") go(now.index - 1);
  else if ((key === "ArrowDown" || key === "ArrowUp") && at.matches?.(".ex-pick")) walk(key === "ArrowDown" ? 1 : -1);
  else if (key === "Enter") {
    if (at.closest?.("button, a, summary")) return; // it is that button's
    if (now.mode === "tutor" && q && !q.final) submit();
    else if (now.index < now.count - 1) go(now.index + 1);
    else if (!now.finished) $(".ex-finish").click();
  } else return;
  event.preventDefault();
});

// -- what the server says -------------------------------------------------------------------------------------------

function update() {
  const told = props.value || { open: false };
  clearTimeout(busy);
  busy = null;
  const late = told.open && now.open && told.id === now.id && told.seq < seq; // overtaken by a later action
  if (!late) {
    seq = Math.max(seq, told.seq || 0);
    now = told;
    ends = now.left === null || now.left === undefined ? null : Date.now() + now.left * 1000;
    clock.asked = false;
    draw();
  }
  next();
}
function speak() {
  words = JSON.parse(props.words || "{}");
  for (const made of element.querySelectorAll("[data-t]")) made.textContent = say(made.dataset.t);
  for (const cell of $(".ex-cells").children) cell.className = "";
  keysSwitch();
  draw();
}
watch("value", update);
watch("words", speak);
speak();
update();
