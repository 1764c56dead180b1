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
  // Rows that the server has just written.
  ming.keepProgress = (text) => {
    if (!text) return;
    const changes = JSON.parse(text);
    if (!changes.rows) return;
    const found = kept();
    found.columns = changes.columns;
    for (const [table, rows] of Object.entries(changes.rows)) {
      const own = (found.rows[table] ??= {}), at = changes.keys[table].map((name) => changes.columns[table].indexOf(name));
      for (const row of rows) own[at.map((i) => row[i]).join("|")] = row;
    }
    for (const id of changes.gone || []) {
      delete found.rows.sittings?.[id];
      for (const key of Object.keys(found.rows.responses || {})) if (key.startsWith(`${id}|`)) delete found.rows.responses[key];
    }
    try { localStorage.setItem(STORE, JSON.stringify(found)); } catch {
      // full, or a private window: said where it cannot be missed
      const made = document.querySelector("#ming-exam-message"), words = document.querySelector("#ming-words")?.dataset.words;
      if (made && words) made.textContent = JSON.parse(words).full;
    }
  };
  ming.forgetProgress = () => localStorage.removeItem(STORE);
})();
