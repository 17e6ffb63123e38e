// SPDX-License-Identifier: Apache-2.0
// What the pages of a report and of a preview share: their data, theme, links and footer.
const report = JSON.parse(document.getElementById("run-data").textContent);
const figures = []; // of charts, drawn again when the reader changes something

// What the reader set is kept while the page reloads; a browser may not allow it.
const memory = {
  key: (name) => `jaxllm ${location.pathname} ${name}`,
  get(name, other) { try { return JSON.parse(sessionStorage.getItem(this.key(name))) ?? other; } catch { return other; } },
  set(name, value) { try { sessionStorage.setItem(this.key(name), JSON.stringify(value)); } catch { /* as without */ } },
};

const when = (seconds) => (seconds ? new Date(1000 * seconds).toLocaleString() : "–");
const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
const row = (tag, texts, from = 9, path = -1) => make("tr", {}, cells(tag, texts, from, path));
const rowHeader = (name, text) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "any" }, text));
const scroll = (label, table) => make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": label }, table);

function redraw() {
  plots.length = 0;
  for (const one of figures) one.draw();
}

function theme() {
  const button = document.getElementById("theme"), names = ["auto", "light", "dark"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const picture = location.hash === "#picture";
  const apply = () => {
    const chosen = memory.get("theme", "auto");
    const is = picture ? "light" : chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
    document.documentElement.dataset.theme = is;
    button.textContent = `◐ ${chosen}`;
    button.setAttribute("aria-label", `Theme: ${chosen}`);
    redraw();
  };
  button.addEventListener("click", () => { memory.set("theme", names[(names.indexOf(memory.get("theme", "auto")) + 1) % 3]); apply(); });
  dark.addEventListener("change", apply);
  apply();
}

// Links to the sections of [[id, name]] that the page has, the footer, and the theme.
function frame(sections) {
  document.getElementById("nav").append(...sections.filter(([id]) => document.getElementById(id)).map(([id, name]) => make("a", { href: `#${id}` }, name)));
  document.getElementById("footer").append(`Written ${when(report.written)} by jaxllm. This page loads nothing. Charts: uPlot, MIT licence.`);
  theme();
}
