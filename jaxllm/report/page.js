// SPDX-License-Identifier: Apache-2.0
// The page: headline, curves, samples, data, config and machine of each run.
const runs = report.runs;
const many = runs.length > 1;
const STATES = {
  starting: ["◌", "starting"], running: ["●", "running"], done: ["✓", "done"], early: ["✓", "stopped early"],
  stopped: ["❚❚", "stopped"], failed: ["✕", "failed"], killed: ["✕", "ended unexpectedly"],
};
const title = many ? "h4" : "h3"; // of a panel: several runs have headings of their own
const SIZES = [["B", 1e9], ["M", 1e6], ["k", 1e3]];

const last = (run, metric) => (run.train.about[metric] || [])[1];

function count(value) {
  const size = SIZES.find(([, least]) => value >= least);
  return size ? `${Number((value / size[1]).toPrecision(3))} ${size[0]}` : String(value);
}

// ---- headline

function stateOf(run) {
  const [sign, name] = STATES[run.state] || ["", run.state];
  return make("span", { class: `state ${run.state}` }, make("span", { "aria-hidden": "true" }, sign), name);
}

function aboutRun(run) {
  const start = run.starts[run.starts.length - 1] || {};
  const parts = [run.objective, run.model, start.parameters && `${count(start.parameters)} parameters`];
  if (start.trainable && start.trainable < start.parameters) parts.push(`${count(start.trainable)} trained`);
  parts.push(start.devices && start.devices.replace(/^1 x /, "").replace(" x ", " × "));
  if (start.processes > 1) parts.push(`${start.processes} processes`);
  return parts.filter(Boolean).join(" · ");
}

const WORDS = {
  failed: ["failed", "The run ended with an error: "],
  killed: ["killed", "The run ended without a last line, as when it is killed. The same command resumes it from its last checkpoint."],
  stopped: ["stopped", "The run was stopped by a signal. The same command resumes it."],
};

function message(run) {
  const [kind, text] = WORDS[run.state] || [];
  if (kind) return make("p", { class: `message ${kind}` }, make("span", {}, text + (run.message || "")));
  const age = Date.now() / 1000 - report.written;
  if (run.state !== "running" || age < 2 * (report.every || 30) + 60) return null;
  return make("p", { class: "message stale" }, make("span", {},
    `This page was written ${duration(age)} ago. `, make("code", {}, `jaxllm report ${run.folder}`), " writes it again and tells whether the run is alive."));
}

function progress(run) {
  if (!run.steps) return null;
  const share = Math.min(run.step / run.steps, 1);
  const done = make("div", { class: "done" });
  done.style.width = `${100 * share}%`;
  const end = run.left !== null ? `${duration(run.left)} left` : run.seconds ? `${duration(run.seconds)} in all` : "";
  return make("div", { class: "progress" },
    make("div", { class: "track", role: "progressbar", "aria-label": "Steps", "aria-valuemin": "0", "aria-valuemax": String(run.steps), "aria-valuenow": String(run.step) }, done),
    make("div", { class: "under" }, make("span", {}, make("b", {}, `Step ${whole(run.step)}`), ` of ${whole(run.steps)} (${Math.floor(100 * share)}%)`), make("span", { class: "soft" }, end)));
}

function tiles(run) {
  const made = [];
  const add = (name, big, unit, sub) => made.push(make("div", { class: "tile" }, make("dt", {}, name),
    make("dd", { class: "big" }, big, unit ? [" ", make("small", {}, unit)] : null), make("dd", { class: "sub" }, sub || "")));
  const about = (metric) => run.train.about[metric] || [];
  const reward = run.online && about("reward")[1] !== undefined;
  if (reward) add("Reward", number(about("reward")[1]), "", `first ${number(about("reward")[0])}`);
  if (about("loss")[1] !== undefined) add("Training loss", number(about("loss")[1]), "", `first ${number(about("loss")[0])}`);
  const best = run.best;
  const sets = Object.values(run.evals).filter((part) => part.about.loss);
  if (sets.length && sets[0].about.loss[1] !== null) {
    const text = best ? `best ${/loss$/.test(best.metric) ? "" : `${best.metric.replace(/^eval_/, "")} `}${number(best.value)} at step ${whole(best.step)}` : "";
    add("Evaluation loss", number(sets[0].about.loss[1]), "", text);
  } else if (best) add(`Best ${best.metric}`, number(best.value), "", `step ${whole(best.step)}`);
  if (last(run, "tokens_per_second")) {
    const seen = run.train.tokens[run.train.tokens.length - 1];
    add("Throughput", number(last(run, "tokens_per_second")), "tokens/s", seen ? `${count(seen)} tokens so far` : "");
  }
  if (last(run, "mfu")) add("MFU", number(last(run, "mfu"), "percent"), "", "of the peak FLOP/s");
  if (last(run, "memory_gib")) add("Peak memory", number(last(run, "memory_gib")), "GiB", run.plan ? `planned ${number(run.plan.memory_gib)}` : "");
  const ledger = run.ledger;
  if (ledger) {
    const total = Object.entries(ledger).filter(([key]) => key.endsWith("_seconds")).reduce((sum, [, value]) => sum + value, 0);
    const rollouts = run.online && ledger.rollout_seconds ? `; rollouts ${number(ledger.rollout_seconds / total, "percent")}` : "";
    add("Goodput", number(ledger.goodput, "percent"), "", ledger.restarts ? plural(ledger.restarts, "restart") : `of the time in steps${rollouts}`);
  }
  if (!ledger && run.seconds) add("Elapsed", duration(run.seconds), "", run.starts.length > 1 ? plural(run.starts.length - 1, "restart") : "");
  return made.length ? make("dl", { class: "tiles" }, made) : null;
}

function headline() {
  const made = make("section", { id: "overview", class: "run" });
  if (!many) {
    const run = runs[0];
    made.append(make("div", { class: "head" }, make("h1", {}, run.name), stateOf(run)), make("p", { class: "about" }, aboutRun(run)));
    for (const part of [message(run), progress(run), tiles(run)]) if (part) made.append(part);
    return made;
  }
  const heads = ["run", "state", "step", "loss", "best evaluation", "tokens/s", "MFU", "memory", "took"];
  const body = runs.map((run, i) => {
    const box = make("input", { type: "checkbox", checked: view.shown[i], onchange: () => { view.shown[i] = box.checked; redraw(); } });
    const best = run.best ? `${number(run.best.value)} at ${whole(run.best.step)}` : "–";
    const steps = run.steps ? `${whole(run.step)} / ${whole(run.steps)}` : whole(run.step);
    const memory = last(run, "memory_gib") ? `${number(last(run, "memory_gib"))} GiB` : "–";
    const numbers = [steps, number(last(run, "loss")), best, number(last(run, "tokens_per_second")), number(last(run, "mfu"), "percent"), memory, duration(run.seconds)];
    return make("tr", {}, make("td", {}, make("label", {}, box, swatch({ index: i, dash: 0 }), run.name)), make("td", {}, stateOf(run)), cells("td", numbers, 0));
  });
  made.append(make("h1", {}, `${runs.length} runs`), make("p", { class: "about" }, [...new Set(runs.map((run) => run.objective))].join(", ")));
  const table = make("table", { class: "runs" }, make("thead", {}, row("th", heads, 2)), make("tbody", {}, body));
  const panel = scroll("Runs", table);
  panel.classList.add("panel");
  panel.style.marginTop = "16px";
  made.append(panel);
  return made;
}

// ---- curves

function tools() {
  const set = (key, value) => { view[key] = value; memory.set(key, value); redraw(); };
  const axes = Object.keys(AXES).map((name) => make("label", {}, make("input", {
    type: "radio", name: "axis", value: name, checked: view.x === name, onchange: () => { view.zoom = null; set("x", name); document.dispatchEvent(new Event("zoomed")); },
  }), { step: "steps", tokens: "tokens", time: "time" }[name]));
  const shown = make("output", { for: "smoothing" }, view.smooth ? String(view.smooth) : "off");
  const range = make("input", {
    id: "smoothing", type: "range", min: "0", max: "0.98", step: "0.02", value: String(view.smooth),
    oninput: () => { shown.textContent = Number(range.value) ? range.value : "off"; set("smooth", Number(range.value)); },
  });
  const log = make("input", { type: "checkbox", checked: view.log, onchange: () => set("log", log.checked) });
  const reset = make("button", { type: "button", disabled: true, onclick: () => zoomTo(null) }, "Reset zoom");
  document.addEventListener("zoomed", () => { reset.disabled = !view.zoom; });
  return make("div", { class: "tools", role: "group", "aria-label": "How the curves are drawn" },
    make("fieldset", {}, make("legend", {}, "By"), axes),
    make("label", {}, "Smoothing", range, shown), make("label", {}, log, "Log scale"), reset);
}

function curves() {
  const made = make("section", { id: "curves" }, make("h2", {}, "Curves"), tools());
  made.append(make("p", { class: "hint" }, "Drag over a chart to zoom into all of them; double-click to zoom out. With the keyboard: arrow keys read values, + zooms in, − out.",
    runs.some((run) => run.train.low) ? " A band spans the lowest and the highest value of the steps that a point stands for." : "",
    runs.some((run) => run.resumed.length) ? " A dotted line marks where the run was resumed." : ""));
  const charts = new Map(); // of all runs, a chart once, with the metrics of all
  for (const run of runs) for (const chart of run.charts) {
    const key = `${chart.section}/${chart.title}`;
    const known = charts.get(key);
    charts.set(key, known ? { ...known, metrics: [...new Set([...known.metrics, ...chart.metrics])] } : chart);
  }
  let grid = null, section = null;
  for (const chart of charts.values()) {
    const wide = !grid;
    if (chart.section !== section) {
      section = chart.section;
      grid = make("div", { class: "grid" });
      made.append(make("h3", {}, section), grid);
    }
    const one = figure(chart, runs, { wide });
    figures.push(one);
    grid.append(one.element);
    if (chart.metrics.includes("step_seconds")) grid.append(stepTimes());
  }
  if (!charts.size) made.append(make("p", { class: "soft" }, "No step is logged yet."));
  return made;
}

function stepTimes() {
  const known = runs.filter((run) => run.step_seconds);
  if (!known.length) return "";
  if (!many) {
    const { edges, counts, above } = known[0].step_seconds;
    const one = histogram("Distribution of step times", "s", edges, [{ label: "", index: 0, counts }], (v) => number(v), above ? `${plural(above, "longer step")} not shown` : "");
    figures.push(one);
    return one.element;
  }
  const body = known.map((run) => {
    const about = run.train.about.step_seconds;
    return [run.name, `${number(about[2])} s`, `${number(about[1])} s`, `${number(about[4])} s`];
  });
  return make("figure", { class: "chart panel" }, make("figcaption", {}, make("h4", {}, "Step times")),
    scroll("Step times", make("table", {}, make("thead", {}, row("th", ["run", "shortest", "last", "longest"], 1)), make("tbody", {}, body.map((b) => row("td", b, 1))))));
}

// ---- samples

function samples() {
  const all = runs.flatMap((run) => run.samples.map((one) => ({ ...one, run })));
  if (!all.length) return null;
  const name = (one) => `${many ? `${one.run.name} · ` : ""}step ${whole(one.step)}`;
  const shown = make("div", {});
  const pick = (label, start) => {
    const select = make("select", { onchange: show }, all.map((one, i) => make("option", { value: String(i), selected: i === start }, name(one))));
    return [select, make("label", {}, label, select)];
  };
  const [left, leftLabel] = pick("Left", 0);
  const [right, rightLabel] = pick("Right", all.length - 1);
  function answer(row) {
    const scores = row.reward === null ? [] : [make("b", { class: "score" }, `reward ${number(row.reward)}`),
      ...Object.entries(row.rewards).map(([key, value]) => make("span", { class: "score soft" }, `${key} ${number(value)}`))];
    return make("div", { class: "answer" }, scores.length ? make("p", {}, scores) : null,
      make("p", { class: row.text ? "text" : "text soft" }, row.text || "(empty)"), row.truncated ? make("p", { class: "who" }, "cut at the token limit") : null);
  }
  // What a step has for a prompt; `own` also shows the prompt, where the other step has another.
  function column(one, prompt, own) {
    if (prompt === undefined) return make("div", {});
    const rows = one.rows.filter((r) => r.prompt === prompt);
    return make("div", {}, make("p", { class: "who" }, name(one)), own ? make("p", { class: "prompt" }, prompt) : null, rows.map(answer));
  }
  function show() {
    const [a, b] = [all[Number(left.value)], all[Number(right.value)]];
    const [ours, theirs] = [a, b].map((one) => [...new Set(one.rows.map((r) => r.prompt))]);
    const [onlyA, onlyB] = [ours.filter((p) => !theirs.includes(p)), theirs.filter((p) => !ours.includes(p))];
    const cards = ours.filter((p) => theirs.includes(p)).map((prompt) => make("article", { class: "panel sample" },
      make("p", { class: "prompt" }, prompt), make("div", { class: "answers under" }, column(a, prompt), column(b, prompt))));
    for (let i = 0; i < Math.max(onlyA.length, onlyB.length); i += 1) {
      cards.push(make("article", { class: "panel sample" }, make("div", { class: "answers" }, column(a, onlyA[i], true), column(b, onlyB[i], true))));
    }
    const more = a.more + b.more;
    shown.replaceChildren(...cards, more ? make("p", { class: "hint" }, `${plural(more, "more sample")} in samples.jsonl.`) : "");
  }
  show();
  return make("section", { id: "samples", class: "other" }, make("h2", {}, "Samples"), make("div", { class: "pick" }, leftLabel, rightLabel), shown);
}

// ---- data

function data() {
  const known = runs.filter((run) => run.data.train);
  if (!known.length) return null;
  const made = make("section", { id: "data", class: "other" }, make("h2", {}, "Data"));
  const heads = ["set", "source", "examples", "tokens", "learned", "rows", "dropped", "truncated", "share"];
  for (const run of known) {
    if (many) made.append(make("h3", {}, run.name));
    const sets = [["train", run.data.train], ...Object.entries(run.data.eval || {})];
    const rows = sets.flatMap(([set, entry]) => (entry.sources || []).map((source) => {
      const dropped = Object.entries(source).filter(([key]) => key.startsWith("dropped_")).reduce((sum, [, n]) => sum + n, 0);
      const learned = source.learned_tokens && source.tokens ? number(source.learned_tokens / source.tokens, "percent") : "–";
      const share = set === "train" ? number(source.share, "percent") : "–";
      return row("td", [set, source.path, number(source.examples), number(source.tokens), learned, number(source.rows), number(dropped), number(source.truncated), share], 2, 1);
    }));
    const fill = run.data.train.fill ? `Rows of training are ${number(run.data.train.fill, "percent")} full at ${number(run.data.max_length)} tokens.` : "";
    made.append(make("div", { class: "panel" }, scroll("Sources", make("table", {}, make("thead", {}, row("th", heads, 2)), make("tbody", {}, rows))), make("p", { class: "hint" }, fill)));
    const grid = make("div", { class: "grid" });
    grid.style.marginTop = "14px";
    for (const [set, entry] of sets) for (const source of entry.sources || []) {
      if (!source.lengths || source.lengths.edges.length < 3) continue; // all of one length
      const one = histogram(`Lengths: ${set}`, "tokens an example", source.lengths.edges, [{ label: "", index: set === "train" ? 0 : 1, counts: source.lengths.counts }], (v) => number(v), source.path, title);
      figures.push(one);
      grid.append(one.element);
    }
    made.append(grid);
  }
  return made;
}

// ---- config

function config() {
  const keys = [...new Set(runs.flatMap((run) => run.config.map(([key]) => key)))];
  const of = runs.map((run) => new Map(run.config.map(([key, value, origin]) => [key, [value, origin]])));
  const body = make("tbody", {}), none = make("p", { class: "soft hidden" }, "No key matches.");
  const words = make("input", { type: "search", placeholder: "key or value", oninput: show });
  const only = make("input", { type: "checkbox", checked: true, onchange: show });
  const heads = many ? ["key", ...runs.map((run) => run.name)] : ["key", "value", "from"];
  function show() {
    const rows = keys.map((key) => {
      const found = of.map((one) => one.get(key) || ["–", "default"]);
      const differs = many && new Set(found.map(([value]) => value)).size > 1;
      const listed = many ? differs : found[0][1] !== "default";
      const text = many ? [key, ...found.map(([value]) => value)] : [key, ...found[0]];
      const matches = text.join(" ").toLowerCase().includes(words.value.trim().toLowerCase());
      if (!matches || (only.checked && !listed)) return null;
      return make("tr", { class: differs && !only.checked ? "changed" : "" }, make("td", { class: "mono" }, key), text.slice(1).map((t, i) => make("td", { class: many || i === 0 ? "mono any" : "soft any" }, t)));
    }).filter(Boolean);
    body.replaceChildren(...rows);
    none.classList.toggle("hidden", rows.length > 0);
  }
  show();
  return make("section", { id: "config", class: "other" }, make("h2", {}, "Config"),
    make("div", { class: "pick" }, make("label", {}, "Find", words), make("label", {}, only, many ? "only what differs" : "only what was set")),
    make("div", { class: "panel" }, scroll("Config", make("table", {}, make("thead", {}, row("th", heads)), body)), none));
}

// ---- machine, time, checkpoints

function timeTable(run) {
  const ledger = run.ledger;
  if (!ledger) return null;
  const phases = Object.entries(ledger).filter(([key]) => key.endsWith("_seconds")).map(([key, value]) => [key.replace("_seconds", ""), value]).sort((a, b) => b[1] - a[1]);
  const total = phases.reduce((sum, [, value]) => sum + value, 0) || 1;
  const bar = make("div", { class: "share", "aria-hidden": "true" }, phases.map(([, value], i) => {
    const part = make("span", {});
    part.style.width = `${(100 * value) / total}%`;
    part.style.background = `var(--s${i % 8})`;
    return part;
  }));
  const rows = phases.map(([name, value], i) => make("tr", {}, make("td", {}, make("label", {}, swatch({ index: i, dash: 0 }), name)), cells("td", [duration(value), number(value / total, "percent")], 0)));
  return make("div", { class: "panel" }, make(title, { class: "title" }, "Where the time went"), bar,
    make("table", {}, make("thead", {}, row("th", ["phase", "time", "share"], 1)), make("tbody", {}, rows)));
}

function planTable(run) {
  if (!run.plan) return null;
  const rows = [["Memory a device", `${number(run.plan.memory_gib)} GiB`, `${number((run.train.about.memory_gib || [])[4])} GiB`]];
  if (run.plan.mfu) rows.push(["MFU", `at most ${number(run.plan.mfu, "percent")}`, number((run.train.about.mfu || [])[1], "percent")]);
  return make("div", { class: "panel" }, make(title, { class: "title" }, "Planned and measured"),
    make("table", {}, make("thead", {}, row("th", ["", "planned", "measured"], 1)), make("tbody", {}, rows.map((r) => row("td", r, 1)))));
}

function checkpointTable(run) {
  const best = run.best && run.best.step;
  const rows = run.checkpoints.map((one) => row("td", [`${whole(one.step)}${one.step === best ? " ★ best" : ""}`, one.gib === null ? "–" : one.gib < 0.1 ? `${number(1024 * one.gib)} MiB` : `${number(one.gib)} GiB`, when(one.time)], 1));
  return make("div", { class: "panel" }, make(title, { class: "title" }, "Checkpoints"),
    rows.length ? make("table", {}, make("thead", {}, row("th", ["step", "size", "saved"], 1)), make("tbody", {}, rows)) : make("p", { class: "soft" }, "None yet."),
    run.final ? make("p", { class: "hint" }, "The trained model is in ", make("code", {}, `${run.folder}/final`)) : null);
}

function machine() {
  const made = make("section", { id: "machine", class: "other" }, make("h2", {}, "Machine and time"));
  for (const run of runs) {
    if (many) made.append(make("h3", {}, run.name));
    const start = run.starts[run.starts.length - 1] || {};
    const mesh = Object.entries(start.mesh || {}).map(([axis, size]) => `${axis} ${size}`).join(" × ");
    const facts = [["Devices", (start.devices || "").replace(" x ", " × ")], ["Processes", start.processes > 1 && String(start.processes)], ["Mesh", mesh], ["Began", when(run.began)], ["Last line", when(run.last)], ["Folder", run.folder],
      ...Object.entries(start.versions || {})].filter(([, text]) => text);
    const starts = run.starts.length > 1 ? make("div", { class: "panel" }, make(title, { class: "title" }, "Starts"), scroll("Starts", make("table", {}, make("thead", {}, row("th", ["when", "from step", "devices", "changed"])),
      make("tbody", {}, run.starts.map((s) => row("td", [when(s.time), whole(s.step), (s.devices || "–").replace(" x ", " × "), Object.keys(s.changed || {}).join(", ")])))))) : null;
    made.append(make("div", { class: "two" }, [timeTable(run), planTable(run), checkpointTable(run), starts,
      make("div", { class: "panel" }, make(title, { class: "title" }, "Environment"), make("table", {}, make("tbody", {}, facts.map(([name, text]) => rowHeader(name, String(text))))))].filter(Boolean)));
  }
  return made;
}

// ---- reload, start

// Whether a reload would disturb the reader.
const busy = () => Boolean(view.zoom || document.activeElement?.closest("main :is(input, select, button, details, .plot, .scroll)"));

function reload() {
  if (!runs.some((run) => ["running", "starting"].includes(run.state))) return;
  const box = make("input", { type: "checkbox", checked: memory.get("reload", true), onchange: () => memory.set("reload", box.checked) });
  document.getElementById("reload").append(make("label", { title: `The run rewrites this page about every ${duration(report.every || 30)}` }, box, "Reload"));
  setInterval(() => {
    if (box.checked && !busy() && !document.hidden) location.reload();
  }, 30000);
}

// By default: none for a few rows, and more the more there are.
function smoothing() {
  const rows = Math.max(...runs.map((run) => run.train.step.length));
  return rows > 300 ? 0.86 : rows > 30 ? 0.6 : 0;
}

function start() {
  view.x = memory.get("x", "step");
  view.log = memory.get("log", false);
  view.smooth = memory.get("smooth", smoothing());
  view.shown = runs.map(() => true);
  if (location.hash === "#picture") document.documentElement.dataset.picture = "";
  const main = document.getElementById("main");
  main.replaceChildren(...[headline(), curves(), samples(), data(), config(), machine()].filter(Boolean));
  frame([["curves", "Curves"], ["samples", "Samples"], ["data", "Data"], ["config", "Config"], ["machine", "Machine"]]);
  reload();
  document.documentElement.dataset.height = String(Math.ceil(main.getBoundingClientRect().bottom + scrollY));
}

start();
