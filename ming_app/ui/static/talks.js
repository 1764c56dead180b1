// The list of conversations. Runs inside gr.HTML's js_on_load (element, props, watch, trigger). What a person does goes to
// the server as one event; it answers with the list as it then is. All text goes in as text, never as markup.

const $ = (selector) => element.querySelector(selector);
const KINDS = ["", "markdown", "html", "json", "all", "feedback", "note"];
let words = {}, now = { items: [] }, sure = null, renaming = "", back = null; // [id, class]: where the keyboard goes on

const send = (action, id = "", value = null) => trigger("select", { value: JSON.stringify({ do: action, id, value }) });
const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  if (tag === "button") made.type = "button";
  return made;
};
const small = (className, sign, label, act) => {
  const made = node("button", `tk-small ${className}`, sign);
  made.setAttribute("aria-label", label);
  made.title = label;
  made.addEventListener("click", act);
  return made;
};

function draw() {
  $(".tk-incognito").checked = !!now.incognito;
  const typing = renaming && $(".tk-name") && now.items.some((item) => item.id === renaming);
  if (!typing) keepingFocus(rows); // what is being typed stays
  $(".tk-note").textContent = now.note || (now.items.length ? "" : words[now.search ? "none_found" : "none"]);
  $(".tk-export").replaceChildren(...KINDS.filter((kind) => kind !== "note" || now.consult).map((kind) => new Option(words["export_" + kind], kind)));
  confirmation();
}
function keepingFocus(redraw) {
  const list = $(".tk-list"), at = document.activeElement?.closest(".tk-list button");
  const [id, name] = at ? [at.closest("li").dataset.id, at.className.split(" ").pop()] : back || [];
  redraw();
  if (!name) return;
  const row = [...list.children].find((made) => made.dataset.id === id), made = row ? row.querySelector(`.${name}`) : $(".tk-new");
  made?.focus({ preventScroll: true });
  back = null;
}
function rows() { $(".tk-list").replaceChildren(...now.items.map(rowOf)); }
function rowOf(item) {
  const row = node("li", item.here ? "tk-here" : "");
  row.dataset.id = item.id;
  if (renaming === item.id) {
    const box = node("input", "tk-name");
    box.value = item.title;
    box.maxLength = 80;
    box.setAttribute("aria-label", words.rename);
    box.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault(); // the button that gets the focus must not be pressed by the same key
      done();
      draw();
      if (event.key === "Enter") send("rename", item.id, box.value);
    });
    box.addEventListener("blur", () => {
      if (renaming !== item.id) return;
      renaming = "";
      row.replaceWith(rowOf(item)); // no other row: one of its buttons may be pressed just now
      send("rename", item.id, box.value);
    });
    row.append(box);
    queueMicrotask(() => { box.focus(); box.select(); });
    return row;
  }
  const open = node("button", "tk-open"), label = node("span", "tk-title", (item.pinned ? "📌 " : "") + (item.title || words.untitled));
  open.append(label, node("small", "", item.when));
  if (item.here) open.setAttribute("aria-current", "true");
  open.addEventListener("click", () => send("open", item.id));
  row.append(
    open,
    small("tk-pin", item.pinned ? "★" : "☆", words[item.pinned ? "unpin" : "pin"], () => send("pin", item.id, !item.pinned)),
    small("tk-rename", "✎", words.rename, () => { renaming = item.id; draw(); }),
    small("tk-delete", "×", words.delete, () => ask({ do: "delete", id: item.id, text: words.sure_delete.replace("{title}", item.title || words.untitled) })),
  );
  return row;
}
function done() { back = [renaming, "tk-rename"]; renaming = ""; }
function ask(what) { sure = what; confirmation(); $(".tk-yes").focus(); }
function confirmation() {
  $(".tk-confirm").hidden = !sure;
  if (sure) $(".tk-confirm span").textContent = sure.text;
}
$(".tk-yes").addEventListener("click", () => { const what = sure; sure = null; confirmation(); $(".tk-new").focus(); send(what.do, what.id); if (what.do === "wipe") ming.forget("chat"); });
$(".tk-no").addEventListener("click", () => {
  back = [sure.id, "tk-delete"];
  sure = null;
  if (back[0]) draw(); else { back = null; confirmation(); $(".tk-wipe").focus(); }
});
$(".tk-new").addEventListener("click", () => send("new"));
$(".tk-incognito").addEventListener("change", () => send("incognito", "", $(".tk-incognito").checked));
$(".tk-wipe").addEventListener("click", () => ask({ do: "wipe", id: "", text: words.sure_wipe }));
$(".tk-import").addEventListener("click", () => document.querySelector("#ming-talks-upload input, #ming-talks-upload button, button#ming-talks-upload")?.click());
$(".tk-export").addEventListener("change", () => { const kind = $(".tk-export").value; $(".tk-export").value = ""; if (kind) send("export", "", kind); });
let searching = null;
$(".tk-search").addEventListener("input", () => { clearTimeout(searching); searching = setTimeout(() => send("search", "", $(".tk-search").value), 250); });

function update() {
  now = props.value || { items: [] };
  if (now.here) ming.rememberTalk(now.here === "-" ? "" : now.here);
  draw();
}
function speak() {
  words = JSON.parse(props.words || "{}");
  for (const made of element.querySelectorAll("[data-t]")) made.textContent = words[made.dataset.t] || "";
  $(".tk-search").placeholder = words.search;
  $(".tk-search").setAttribute("aria-label", words.search);
  $(".tk-export").setAttribute("aria-label", words.export_);
  $(".tk").setAttribute("aria-label", words.title);
  draw();
}
const wide = matchMedia("(min-width: 1280px)");
const fold = () => { $(".tk-fold").open = wide.matches; };
wide.addEventListener("change", fold);
watch("value", update);
watch("words", speak);
fold();
speak();
update();
