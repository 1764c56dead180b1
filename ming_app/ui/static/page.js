// What the page does in the browser itself: appearance, remembered choices, keys, the character count.
(() => {
  const STORE = "ming.ui"; // {v: 1, lang, theme, talk} and nothing else: no text a person typed is kept

  const prefs = () => {
    try { return { v: 1, ...JSON.parse(localStorage.getItem(STORE) || "{}") }; } catch { return { v: 1 }; }
  };
  const remember = (changes) => {
    try { localStorage.setItem(STORE, JSON.stringify({ ...prefs(), ...changes })); } catch { /* private mode: choices last until reload */ }
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const theme = prefs().theme || "auto";
    document.body?.classList.toggle("dark", theme === "dark" || (theme === "auto" && system.matches));
  };
  system.addEventListener("change", paint);

  const language = () => ((prefs().lang || navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");
  // The page is built in English; one that will be Chinese is held back (a moment, page.css sees to that) until reworded.
  document.documentElement.classList.toggle("ming-hold", language() !== "en");

  window.ming = {
    // Interface language and appearance to begin with, and the seconds this clock is ahead of UTC.
    first: () => {
      paint();
      document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
      return [language(), prefs().theme || "auto", -60 * new Date().getTimezoneOffset()];
    },
    ready: () => {
      document.documentElement.classList.remove("ming-hold");
      document.documentElement.dataset.ming = "ready";
    },
    setLang: (lang) => {
      remember({ lang });
      document.documentElement.lang = lang === "zh" ? "zh-CN" : "en";
    },
    setTheme: (theme) => { remember({ theme }); paint(); },
    // The conversation in view: of this window, and of the last one.
    rememberTalk: (id) => {
      try { sessionStorage.setItem("ming.talk", id); } catch { /* private mode */ }
      if ((prefs().talk || "") !== id) remember({ talk: id });
    },
    lastTalk: () => { try { return sessionStorage.getItem("ming.talk") ?? prefs().talk ?? ""; } catch { return ""; } },
    // Asks before what cannot be undone.
    sure: (key) => confirm(JSON.parse(document.querySelector("#ming-words").dataset.words).sure[key]),
    mayReplaceChat: () => !document.querySelector("#ming-chat [data-testid=user]") || ming.sure("chat"),
    // Downloads the file that the server has just prepared.
    save: (file) => {
      const link = Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name });
      document.body.append(link);
      link.click();
      link.remove();
    },
  };

  const input = () => document.querySelector("#ming-input textarea");

  // Keys pressed while an input method is composing (pinyin) belong to it: Enter must not send, Escape must not stop.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === input() && (event.isComposing || event.keyCode === 229)) event.stopImmediatePropagation();
    if (event.key === "Escape" && !event.isComposing && event.keyCode !== 229 && !event.target.matches?.(".tk-name")) {
      const button = document.querySelector("#ming-stop");
      if (button && button.offsetParent) { button.click(); input()?.focus(); }
    }
    if (event.key === "ArrowUp" && event.target === input() && !input().value && !event.isComposing) { // edits the last question
      const edits = document.querySelectorAll('#ming-chat button[data-key="chat.edit"]');
      if (edits.length) { event.preventDefault(); edits[edits.length - 1].click(); }
    }
  }, true);

  const count = () => {
    const area = input(), text = document.querySelector("#ming-words")?.dataset.count;
    if (!area || !text) return;
    let made = document.querySelector("#ming-count");
    if (!made) {
      made = Object.assign(document.createElement("span"), { id: "ming-count" });
      made.setAttribute("aria-hidden", "true");
      document.querySelector("#ming-input").append(made);
    }
    const used = [...area.value].length, said = used ? text.replace("{n}", used) : "";
    if (made.textContent !== said) made.textContent = said;
  };
  document.addEventListener("input", (event) => { if (event.target === input()) count(); }, true);
  setInterval(count, 500); // the box is also filled and emptied by the page, without an input event

  // Gradio words its own small buttons by the browser's language; the page's language decides here.
  const relabel = () => {
    const words = document.querySelector("#ming-words")?.dataset.words;
    if (!words) return;
    const table = JSON.parse(words), put = (made, name, text) => { if (made.getAttribute(name) !== text) made.setAttribute(name, text); };
    for (const button of document.querySelectorAll("#ming-chat button[aria-label]")) {
      const key = button.dataset.key || Object.keys(table.was).find((name) => table.was[name].includes(button.getAttribute("aria-label")));
      if (!key) continue;
      button.dataset.key = key;
      for (const name of ["aria-label", "title"]) if (button.hasAttribute(name)) put(button, name, table.now[key]);
    }
    if (document.title !== table.title) document.title = table.title;
    // Every answer leads to the explorer: a button of ours at the end of Gradio's own.
    document.querySelectorAll("#ming-chat .message-buttons-left .icon-button-wrapper").forEach((bar, index) => {
      let made = bar.querySelector(".m-open");
      if (!made) {
        made = Object.assign(document.createElement("button"), { type: "button", className: "m-open" });
        made.addEventListener("click", () => { ming.opened = +made.dataset.index; document.querySelector("#ming-open-answer").click(); });
        bar.append(made);
      }
      if (made.textContent !== table.open) made.textContent = table.open;
      if (made.dataset.index !== String(index)) made.dataset.index = index;
    });
    for (const made of document.querySelectorAll(".empty[aria-label]:not([role])")) put(made, "role", "img"); // an empty plot
    const log = document.querySelector("#ming-chat [role=log]");
    if (log) put(log, "aria-label", table.log);
    for (const made of document.querySelectorAll("#ming-chat [data-testid=user], #ming-chat [data-testid=bot]")) put(made, "aria-label", table[made.dataset.testid]);
  };
  // Beside the messages: ‹n/m› where there are several versions, and notes of the checks. Drawn from what the server says,
  // outside the text that a model wrote.
  const beside = () => {
    const table = JSON.parse(document.querySelector("#ming-words")?.dataset.words || "{}"), data = document.querySelector("#ming-marks-data")?.dataset.marks || "[]";
    const marks = new Map(JSON.parse(data).map((mark) => [mark.i, mark]));
    document.querySelectorAll("#ming-chat [data-testid=user], #ming-chat [data-testid=bot]").forEach((message, index) => {
      const row = message.closest(".message-row"), mark = marks.get(index);
      if (!row) return;
      let made = row.nextElementSibling?.classList.contains("m-marks") ? row.nextElementSibling : null;
      if (!mark) { made?.remove(); return; }
      const state = JSON.stringify([mark, table.branch]);
      if (made?.dataset.state === state) return;
      made?.remove();
      made = Object.assign(document.createElement("div"), { className: "m-marks" });
      made.dataset.state = state;
      for (const text of mark.notes) made.append(Object.assign(document.createElement("p"), { className: "m-check", textContent: "⚠ " + text }));
      if (mark.n > 1) {
        const picker = Object.assign(document.createElement("span"), { className: "m-branch" });
        const step = (sign, label, by, off) => {
          const button = Object.assign(document.createElement("button"), { type: "button", textContent: sign, title: label, disabled: off });
          button.setAttribute("aria-label", label);
          button.addEventListener("click", () => { ming.branchAsked = [index, by]; document.querySelector("#ming-branch").click(); });
          return button;
        };
        const shown = Object.assign(document.createElement("span"), { textContent: `${mark.at}/${mark.n}` });
        shown.setAttribute("aria-label", table.branch.replace("{i}", mark.at).replace("{n}", mark.n));
        picker.append(step("‹", table.branch_back, -1, mark.at === 1), shown, step("›", table.branch_on, 1, mark.at === mark.n));
        made.append(picker);
      }
      row.after(made);
    });
  };
  // At most once in 120 ms, also while an answer streams without a pause.
  new MutationObserver(() => { relabel.timer ??= setTimeout(() => { relabel.timer = null; relabel(); beside(); }, 120); })
    .observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-words", "data-marks"] });
  document.addEventListener("DOMContentLoaded", paint);
  paint();
})();
