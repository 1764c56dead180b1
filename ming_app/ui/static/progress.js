// Exam progress kept in this browser, where the server keeps none: the rows of an export by their keys, in localStorage.
(() => {
  const STORE = "ming.exam", VERSION = 1;
  const kept = () => {
    try {
      const found = JSON.parse(localStorage.getItem(STORE) || "null");
      return found?.v === VERSION ? found : { v: VERSION, columns: {}, rows: {} };
    } catch { return { v: VERSION, columns: {}, rows: {} }; }
  };
  // The file that the server takes back (progress_file.py).
  ming.progress = () => {
    const found = kept(), tables = Object.fromEntries(Object.entries(found.rows).map(([table, rows]) => [table, Object.values(rows)]));
    return Object.keys(tables).length ? JSON.stringify({ ming_progress: 1, columns: found.columns, ...tables }) : "";
  };
  const say = (key) => JSON.parse(document.querySelector("#ming-words").dataset.words)[key];
  // Finished sittings that are kept with every answer; of older ones the figures stay (answers, tally, cards).
  const SITTINGS = 60;
  const prune = (rows, columns) => {
    const finished = columns.sittings.indexOf("finished"), own = rows.sittings || {};
    const over = Object.entries(own).filter(([, row]) => row[finished] !== null).sort((a, b) => b[1][finished] - a[1][finished]);
    forget(rows, over.slice(SITTINGS).map(([id]) => id));
  };
  const forget = (rows, ids) => {
    const gone = new Set(ids);
    for (const id of gone) delete rows.sittings?.[id];
    for (const key of Object.keys(rows.responses || {})) if (gone.has(key.split("|")[0])) delete rows.responses[key];
  };
  // Rows that the server has just written. `store` names what it keeps for this page: another name than before means that
  // it has forgotten us (it was started anew), and rows that begin from nothing must not replace ours.
  ming.keepProgress = (text) => {
    if (!text) return;
    const changes = JSON.parse(text);
    ming.store ??= changes.store;
    if (ming.store !== changes.store) {
      alert(say("forgotten"));
      location.reload();
      return;
    }
    if (!changes.rows) return;
    const found = kept();
    found.columns = changes.columns;
    for (const [table, rows] of Object.entries(changes.rows)) {
      const own = (found.rows[table] ??= {}), at = changes.keys[table].map((name) => changes.columns[table].indexOf(name));
      for (const row of rows) own[at.map((i) => row[i]).join("|")] = row;
    }
    for (const [table, keys] of Object.entries(changes.gone)) for (const key of keys) delete found.rows[table]?.[key.join("|")];
    prune(found.rows, found.columns);
    try { localStorage.setItem(STORE, JSON.stringify(found)); } catch {
      // full, or a private window: said where it cannot be missed
      const made = document.querySelector("#ming-exam-message");
      if (made) made.textContent = say("full");
    }
  };
  ming.forgetProgress = () => localStorage.removeItem(STORE);
})();
