// What belongs to a visitor, kept in this browser where the server keeps none: rows by their keys, in localStorage. Exam
// progress and conversations, each under a name of its own.
(() => {
  const VERSION = 1;
  const KINDS = {
    exam: { name: "ming.exam", head: { ming_progress: 1 }, box: "#ming-exam-message", full: "full_exam" },
    chat: { name: "ming.chat", head: {}, box: "#ming-notices", full: "full_chat" },
  };
  const stores = {}; // kind -> what the server calls the rows it holds for this page
  const empty = () => ({ v: VERSION, columns: {}, rows: {} });
  const read = (kind) => {
    try {
      const found = JSON.parse(localStorage.getItem(KINDS[kind].name) || "null");
      return found?.v === VERSION ? found : empty();
    } catch { return empty(); }
  };
  const say = (key) => JSON.parse(document.querySelector("#ming-words").dataset.words)[key];

  // Finished sittings that are kept with every answer; of older ones the figures stay (answers, tally, cards).
  const SITTINGS = 60;
  const prune = ({ rows, columns }) => {
    if (!rows.sittings || !columns.sittings) return;
    const finished = columns.sittings.indexOf("finished");
    const over = Object.entries(rows.sittings).filter(([, row]) => row[finished] !== null).sort((a, b) => b[1][finished] - a[1][finished]);
    const gone = new Set(over.slice(SITTINGS).map(([id]) => id));
    for (const id of gone) delete rows.sittings[id];
    for (const key of Object.keys(rows.responses || {})) if (gone.has(key.split("|")[0])) delete rows.responses[key];
  };

  // Everything of a kind, as the server takes it back; "" for nothing.
  ming.kept = (kind) => {
    const found = read(kind), tables = Object.fromEntries(Object.entries(found.rows).map(([table, rows]) => [table, Object.values(rows)]));
    return Object.keys(tables).length ? JSON.stringify({ ...KINDS[kind].head, columns: found.columns, ...tables }) : "";
  };
  // Rows that the server has just written. `store` names what it holds for this page: another name than before means that it
  // has forgotten us (it was started anew), and rows that begin from nothing must not replace ours.
  ming.keep = (kind, text) => {
    if (!text) return;
    const changes = JSON.parse(text);
    stores[kind] ??= changes.store;
    if (stores[kind] !== changes.store) {
      alert(say("forgotten"));
      location.reload();
      return;
    }
    if (!changes.rows) return;
    const found = read(kind); // read again each time: another window may have written meanwhile
    found.columns = changes.columns;
    for (const [table, rows] of Object.entries(changes.rows)) {
      const own = (found.rows[table] ??= {}), at = changes.keys[table].map((name) => changes.columns[table].indexOf(name));
      for (const row of rows) own[at.map((i) => row[i]).join("|")] = row;
    }
    for (const [table, keys] of Object.entries(changes.gone)) for (const key of keys) delete found.rows[table]?.[key.join("|")];
    if (kind === "exam") prune(found);
    try { localStorage.setItem(KINDS[kind].name, JSON.stringify(found)); } catch {
      // full, or a private window: said where it cannot be missed
      const made = document.querySelector(KINDS[kind].box);
      if (made) made.textContent = say(KINDS[kind].full);
    }
  };
  ming.forget = (kind) => localStorage.removeItem(KINDS[kind].name);
  ming.storeOf = (kind) => stores[kind];
})();
