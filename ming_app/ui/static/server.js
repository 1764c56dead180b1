// A notice while the server is gone (restarting, or a Space asleep). Nothing is asked in normal use: only after a request has
// failed does the page ask for /gradio_api/app_id, every few seconds, until it is answered. A server that started anew has
// forgotten the page: it is loaded again (Gradio does so too), and the question that was being written is put back.
(() => {
  const SIGN = "/gradio_api/app_id", EVERY = 2000, LATER = 10000, PATIENT = 60000; // ms; after a minute it asks less often
  const AWAY = new Set([502, 503, 504]), DRAFT = "ming.draft"; // of this window, until it is back in the box
  const ask = window.fetch.bind(window);
  const home = () => (window.gradio_config?.root || location.origin + location.pathname).replace(/\/$/, "");
  const box = () => document.querySelector("#ming-input textarea");
  let since = 0, timer = null, state = "", leaving = false;

  const draw = () => {
    const words = document.querySelector("#ming-words")?.dataset.words;
    let made = document.querySelector("#ming-gone");
    if (!state || !words) { made?.remove(); return; }
    if (!made) {
      made = Object.assign(document.createElement("div"), { id: "ming-gone" });
      made.innerHTML = '<p></p><p aria-hidden="true"></p>'; // seconds are not read out
      made.firstChild.setAttribute("role", "status");
      made.firstChild.setAttribute("aria-live", "polite");
      document.body.append(made);
    }
    const table = JSON.parse(words).gone, [said, waited] = made.children;
    if (said.textContent !== table[state]) said.textContent = table[state];
    waited.textContent = table.waited.replace("{waited}", Math.round((Date.now() - since) / 1000));
    if (box()?.value) try { sessionStorage.setItem(DRAFT, box().value); } catch { /* private mode */ }
  };
  const say = (what) => { state = what; draw(); };

  const look = async () => {
    try {
      const answer = await ask(home() + SIGN, { cache: "no-store" });
      if (answer.ok) {
        const { app_id } = await answer.json();
        timer = null;
        if (String(app_id) !== String(window.gradio_config?.app_id)) { location.reload(); return; }
        since = 0;
        say("");
        return;
      }
      say(AWAY.has(answer.status) ? "starting" : "away");
    } catch { say("away"); }
    timer = setTimeout(look, Date.now() - since > PATIENT ? LATER : EVERY);
  };
  const suspect = () => {
    if (leaving || timer) return;
    since ||= Date.now();
    timer = setTimeout(look, 0);
  };

  const ours = (target) => new URL(String(target?.url || target), location.href).origin === location.origin;
  window.fetch = async (...given) => {
    try {
      const answer = await ask(...given);
      if (AWAY.has(answer.status) && ours(given[0])) suspect();
      return answer;
    } catch (error) {
      if (error?.name !== "AbortError" && ours(given[0])) suspect();
      throw error;
    }
  };
  setInterval(() => { if (state) draw(); }, 1000);
  addEventListener("beforeunload", () => { leaving = true; setTimeout(() => { leaving = false; }, 3000); });

  // What was in the box when the server went, once the page is there again.
  const restore = () => {
    let draft = null;
    try { draft = sessionStorage.getItem(DRAFT); } catch { /* private mode */ }
    if (!draft) return;
    if (document.documentElement.dataset.ming !== "ready" || !box()) { setTimeout(restore, 200); return; }
    sessionStorage.removeItem(DRAFT);
    if (box().value) return;
    box().value = draft;
    box().dispatchEvent(new Event("input", { bubbles: true }));
  };
  restore();
})();
