// How a question file is read: its format, language and numbering, and what each column means, each to be chosen. Runs
// inside gr.HTML's js_on_load. A choice goes to the server at once, which reads the file again. All text goes in as text.

const box = element.querySelector(".xi");
let words = { titles: {} }, told = {};

const chooser = (label, kind, values, chosen, pick) => {
  const made = document.createElement("label"), name = document.createElement("span"), list = document.createElement("select");
  name.textContent = label;
  list.setAttribute("aria-label", label);
  list.append(...values.map((value) => new Option(words[kind][value] ?? value, value, false, value === chosen)));
  list.addEventListener("change", () => { pick(list.value); trigger("select", { value: JSON.stringify(now()) }); });
  made.append(name, list);
  return made;
};
const now = () => ({ format: told.format, lang: told.lang, count_from: told.count_from, columns: told.columns });

function draw() {
  if (props.words) words = JSON.parse(props.words);
  told = JSON.parse(JSON.stringify(props.value || {})); // ours to change
  if (!told.format) { box.replaceChildren(); return; }
  const part = (title, made) => {
    const group = document.createElement("fieldset"), legend = document.createElement("legend");
    legend.textContent = title;
    group.append(legend, ...made);
    return group;
  };
  const general = ["format", "lang", "count_from"].map((name) => chooser(words.titles[name], name, told.choices[name], told[name], (value) => {
    told[name] = value;
    if (name === "format") told.columns = []; // of another format there are others
  }));
  const columns = told.columns.map((pair, at) => chooser(pair[0], "columns", ["", ...told.choices.columns], pair[1], (value) => {
    for (const other of told.columns) if (value && other[1] === value) other[1] = ""; // each field once
    told.columns[at][1] = value;
  }));
  const groups = [part(words.titles.how, general)];
  if (columns.length) groups.push(part(words.titles.columns, columns));
  box.replaceChildren(...groups);
}
watch("value", draw);
watch("words", draw);
draw();
