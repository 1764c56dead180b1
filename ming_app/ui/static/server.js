// A notice while the server is gone (restarting, or a Space asleep). Nothing is asked in normal use: only after a request has
// failed does the page ask for /gradio_api/app_id, every few seconds, until it is answered.
(() => {
  const SIGN = "/gradio_api/app_id", EVERY = 2000, LATER = 10000, PATIENT = 60000; // ms; after a minute it asks less often
  const AWAY = new Set([502, 503, 504]);
  const ask = window.fetch.bind(window);
  const home = () => (window.gradio_config?.root || location.origin + location.pathname).replace(/\/$/, "");
  let since = 0, timer = null, state = "", leaving = false;

  const words = () => {
    const found = document.querySelector("#ming-words")?.dataset.words;
    return found ? JSON.parse(found).gone : null;
  };
  const draw = () => {
    const table = words();
    let made = document.querySelector("#ming-gone");
    if (!state || !table) { made?.remove(); return; }
    if (!made) {
      made = Object.assign(document.createElement("div"), { id: "ming-gone" });
      made.innerHTML = '<p aria-hidden="true"></p><p class="sr-only" role="status" aria-live="polite"></p><button type="button"></button>';
      made.querySelector("button").addEventListener("click", () => location.reload());
      document.body.append(made);
    }
    const [shown, spoken] = made.querySelectorAll("p"), button = made.querySelector("button");
    shown.textContent = table[state].replace("{waited}", Math.round((Date.now() - since) / 1000));
    const said = table[state].split(/(?<=[.。])\s*/).filter((part) => !part.includes("{waited}")).join(" "); // seconds are not read out
    if (made.dataset.state !== state) { spoken.textContent = said; made.dataset.state = state; }
    button.textContent = table.reload;
    button.hidden = state !== "again";
  };

  const look = async () => {
    timer = null;
    try {
      const answer = await ask(home() + SIGN, { cache: "no-store" });
      if (answer.ok) {
        const { app_id } = await answer.json();
        if (String(app_id) === String(window.gradio_config?.app_id)) { since = 0; state = ""; draw(); return; }
        state = "again";
        draw();
        return;
      }
      state = AWAY.has(answer.status) ? "starting" : "away";
    } catch { state = "away"; }
    draw();
    timer = setTimeout(look, Date.now() - since > PATIENT ? LATER : EVERY);
  };
  const suspect = () => {
    if (leaving || timer || state === "again") return;
    since ||= Date.now();
    timer = setTimeout(look, 0);
  };

  window.fetch = async (...given) => {
    const target = String(given[0]?.url || given[0]);
    try {
      const answer = await ask(...given);
      if (AWAY.has(answer.status) && new URL(target, location.href).origin === location.origin) suspect();
      return answer;
    } catch (error) {
      if (error?.name !== "AbortError" && new URL(target, location.href).origin === location.origin) suspect();
      throw error;
    }
  };
  setInterval(() => { if (state && state !== "again") draw(); }, 1000);
  addEventListener("beforeunload", () => { leaving = true; setTimeout(() => { leaving = false; }, 3000); });
})();
