// SPDX-License-Identifier: Apache-2.0
// The charts of the page. `view` is what the reader has set; uPlot draws.
"use strict";

const view = { x: "step", log: false, smooth: 0, zoom: null, shown: [] };
const plots = []; // {u, refresh} of the charts on the page

// ---- elements and numbers

// An element. Text is set as text, so that nothing of a run becomes markup.
function make(tag, options, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (["checked", "disabled", "value", "open", "selected", "htmlFor", "tabIndex"].includes(name)) made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) made.append(child);
  }
  return made;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const line = (index) => colour(`s${index % 8}`);

function number(value, unit) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (unit === "percent") return `${number(Number((100 * value).toFixed(Math.abs(value) < 0.0995 ? 2 : 1)), "short")}%`;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e12) return `${number(value / 1e12)}T`;
  if (size >= 1e9) return `${number(value / 1e9)}B`;
  if (size >= 1e6) return `${number(value / 1e6)}M`;
  if (size >= 1e5) return `${number(value / 1e3)}k`;
  if (size < 1e-3) return value.toExponential(2).replace("e-", "e−").replace("-", "−");
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4;
  const text = Number.isInteger(value) || unit === "short" ? String(value) : value.toFixed(digits);
  const [whole, part] = text.split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",");
  return (part ? `${grouped}.${part}` : grouped).replace("-", "−");
}

const whole = (value) => (Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : "–");

function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")}`;
  return `${Math.floor(minutes / 1440)} d ${Math.round((minutes % 1440) / 60)} h`;
}

// ---- curves: {label, colour, kind, x, y, low, high, smooth, unit, about}

const AXES = {
  step: { name: "step", of: (part) => part.step, text: (v) => whole(v), tick: (v) => number(v) },
  tokens: { name: "tokens", of: (part) => part.tokens, text: (v) => number(v), tick: (v) => number(v) },
  time: { name: "time", of: (part) => part.time, text: (v) => duration(v), tick: (v) => duration(v) },
};

// Exponential moving average, without the bias of its start.
function smoothed(values, weight) {
  let sum = 0, count = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    count = weight * count + (1 - weight);
    return sum / count;
  });
}

// "reward/exact" among reward/* is "exact"; "reward_chosen" beside "reward_rejected" is "chosen".
function shortNames(names) {
  const first = names[0];
  let size = 0;
  while (names.length > 1 && size < first.length && names.every((n) => n[size] === first[size])) size += 1;
  const cut = Math.max(first.lastIndexOf("/", size - 1), first.lastIndexOf("_", size - 1)) + 1;
  return Object.fromEntries(names.map((name) => [name, (name.slice(cut) || name).replace(/_/g, " ")]));
}

function curve(part, metric, more) {
  const xs = AXES[view.x].of(part);
  const kept = xs.map((x, i) => i).filter((i) => xs[i] !== null && part.mean[metric][i] !== null);
  const pick = (values) => values && kept.map((i) => values[i]);
  return {
    ...more, x: pick(xs), y: pick(part.mean[metric]), low: pick(part.low && part.low[metric]),
    high: pick(part.high && part.high[metric]), about: part.about[metric],
  };
}

function curvesOf(chart, runs) {
  const shown = runs.filter((run, i) => view.shown[i]);
  const many = runs.length > 1;
  const names = shortNames(chart.metrics);
  const evaluated = shown.some((run) => Object.values(run.evals).some((part) => chart.metrics.some((m) => part.mean[m])));
  const made = [];
  for (const run of shown) {
    const place = runs.indexOf(run);
    let kind = 0;
    for (const metric of chart.metrics) {
      const own = chart.metrics.length > 1 ? names[metric] : "";
      const parts = [["train", run.train], ...Object.entries(run.evals)];
      for (const [name, part] of parts) {
        if (!part.mean[metric]) continue;
        const held = part !== run.train;
        const set = held || (!own && (!many || evaluated)) ? name : "";
        const label = [many ? run.name : "", own, set].filter(Boolean).join(" · ");
        // One run: a colour for each metric, or for each set of the only one; several: for each run.
        const index = many ? place : own ? chart.metrics.indexOf(metric) : parts.findIndex(([other]) => other === name);
        made.push(curve(part, metric, { label, run, index, held, dash: many ? kind : 0, metric }));
        kind += 1;
      }
    }
  }
  return made.filter((one) => one.x.length);
}

const WHOLE = Array.from({ length: 16 }, (_, i) => [1, 2, 2.5, 5].map((d) => d * 10 ** i)).flat().filter(Number.isInteger); // between ticks
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

// x of a step on the axis that is shown.
function xOf(part, step) {
  const xs = AXES[view.x].of(part);
  const i = part.step.findIndex((s) => s >= step);
  return xs[i < 0 ? xs.length - 1 : i];
}

// ---- a chart

function figure(chart, runs, options) {
  const at = make("span", { class: "at" });
  const legend = make("ul", { class: "legend" });
  const plot = make("div", { class: "plot" });
  const table = make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": `Values of ${chart.title}` });
  const unit = chart.unit === "percent" ? "" : chart.unit;
  const details = make("details", {}, make("summary", {}, "Values"), table);
  const made = make("figure", { class: `chart panel${options.wide ? " wide" : ""}` },
    make("figcaption", {}, make("h4", {}, chart.title), make("span", { class: "unit" }, unit), at),
    legend, plot, details);
  made.dataset.metrics = chart.metrics.join(" ");
  const state = { u: null, curves: [], best: null, height: options.wide ? 300 : 185 };

  function read(x) { // the logged values at the point nearest to x or before; null: the last ones
    const xs = state.u.data[0], name = AXES[view.x];
    const where = x === null ? xs[xs.length - 1] : xs.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    const parts = state.curves.map((one, i) => {
      const k = one.x.findLastIndex((v) => v <= where);
      const value = number(k < 0 ? null : one.y[k], chart.unit);
      const own = k < 0 || name.text(one.x[k]) === name.text(where) ? "" : ` at ${name.name} ${name.text(one.x[k])}`;
      legend.children[i].lastChild.textContent = x === null ? value : value + own;
      return `${one.label} ${value}${own}`;
    });
    const place = `${name.name} ${name.text(where)}`;
    at.textContent = x === null ? "" : place;
    plot.setAttribute("aria-valuenow", String(where));
    plot.setAttribute("aria-valuetext", `${place}: ${parts.join(", ")}`);
  }

  function draw() {
    if (state.u) state.u.destroy();
    state.curves = curvesOf(chart, runs);
    legend.replaceChildren(...state.curves.map((one) => legendItem(one)));
    state.best = bestOf(chart, runs, state.curves);
    for (const best of state.best) legend.append(bestItem(best, chart.unit, runs.length > 1));
    const broken = brokenValues(chart, runs);
    if (broken) legend.append(make("li", { class: "bad-values" }, `${broken} not finite`));
    details.classList.toggle("hidden", !state.curves.length);
    if (!state.curves.length) {
      plot.replaceChildren(make("p", { class: "soft" }, "No values."));
      return;
    }
    plot.replaceChildren();
    const { data, series, bands } = layers(state.curves, chart, state.best);
    state.u = new uPlot(settings(chart, state, plot, series, bands, read), data, plot);
    plots.push(state);
    const ends = state.curves.map((one) => [one.x[0], one.x[one.x.length - 1]]);
    plot.setAttribute("aria-valuemin", String(Math.min(...ends.map((e) => e[0]))));
    plot.setAttribute("aria-valuemax", String(Math.max(...ends.map((e) => e[1]))));
    read(null);
    if (view.zoom) state.u.setScale("x", { min: view.zoom[0], max: view.zoom[1] });
    if (details.open) fill();
  }

  function fill() { table.replaceChildren(valueTable(state.curves, chart)); }

  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-orientation", "horizontal");
  plot.setAttribute("aria-label", `${chart.title} by ${AXES[view.x].name}; arrow keys read the values`);
  plot.addEventListener("keydown", (event) => keys(event, state, read));
  plot.addEventListener("blur", () => pointAt(null));
  details.addEventListener("toggle", () => { if (details.open) fill(); });
  new ResizeObserver(() => {
    if (state.u && plot.clientWidth) state.u.setSize({ width: plot.clientWidth, height: state.height });
  }).observe(plot);
  state.draw = draw;
  return { element: made, draw };
}

// How many values of the chart are NaN or infinite, and so not drawn.
function brokenValues(chart, runs) {
  const parts = runs.filter((run, i) => view.shown[i]).flatMap((run) => [run.train, ...Object.values(run.evals)]);
  return parts.flatMap((part) => chart.metrics.map((m) => part.broken[m] || 0)).reduce((a, b) => a + b, 0);
}

function swatch(one) {
  const mark = make("span", { class: `swatch ${one.held ? "points" : ["", "dashed", "dotted", "dashed"][one.dash % 4]}`, "aria-hidden": "true" });
  mark.style.borderColor = `var(--s${one.index % 8})`;
  return mark;
}

const legendItem = (one) => make("li", {}, swatch(one), make("span", { class: "name" }, one.label), make("b", {}));

function bestOf(chart, runs, curves) {
  return runs.filter((run, i) => view.shown[i] && run.best).map((run) => {
    const metric = run.best.metric.replace(/^eval_/, "");
    const own = curves.find((one) => one.run === run && one.held && (metric === one.metric || metric.endsWith(`_${one.metric}`)));
    return own && { ...run.best, index: own.index, x: xOf(run.evals[Object.keys(run.evals)[0]], run.best.step), run, mean: Object.keys(run.evals).length > 1 };
  }).filter((best) => best && Number.isFinite(best.x));
}

const bestItem = (best, unit, many) => make("li", {}, make("span", { class: "name" },
  `★ best${many ? ` of ${best.run.name}` : ""} at step ${whole(best.step)}${best.mean ? ", mean of the sets" : ""}`), make("b", {}, number(best.value, unit)));

// What uPlot draws for the curves: {data, series, bands}.
function layers(curves, chart, bests) {
  const tables = [], series = [{}], bands = [];
  const add = (options) => series.push({ spanGaps: true, points: { show: false }, ...options }) - 1;
  for (const one of curves) {
    const stroke = line(one.index);
    const smooth = view.smooth > 0 && !chart.exact && !one.held && one.y.length > 2;
    const columns = [one.x];
    one.line = smooth ? smoothed(one.y, view.smooth) : one.y;
    if (one.low) {
      const high = add({ stroke: "transparent", width: 0 });
      bands.push({ series: [high, add({ stroke: "transparent", width: 0 })], fill: faded(stroke, 0.17) });
      columns.push(one.high, one.low);
    } else if (smooth) {
      add({ stroke: faded(stroke, 0.33), width: 1 });
      columns.push(one.y);
    }
    const few = one.y.length === 1;
    add({
      stroke, width: 2, dash: DASHES[one.dash % 4],
      points: { show: one.held || few, size: few ? 8 : 6, fill: one.held ? colour("panel") : stroke, stroke, width: 2 },
    });
    columns.push(one.line);
    tables.push(columns);
  }
  for (const best of bests.filter((one) => !one.mean)) {
    add({ stroke: line(best.index), width: 0, points: { show: true, size: 13, width: 2, fill: "transparent", stroke: colour("ink") } });
    tables.push([[best.x], [best.value]]);
  }
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
  return { data, series, bands };
}

function faded(text, alpha) {
  const value = parseInt(text.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${alpha})`;
}

function settings(chart, state, plot, series, bands, read) {
  const values = state.curves.flatMap((one) => [...one.y, ...(one.low || [])]);
  const least = values.reduce((a, b) => (b === null ? a : Math.min(a, b)), Infinity);
  const most = values.reduce((a, b) => (b === null ? a : Math.max(a, b)), -Infinity);
  const log = view.log && least > 0;
  const decades = log && most / least > 30;
  const scale = log && !decades ? { distr: 100, fwd: Math.log10, bwd: (v) => 10 ** v } : log ? { distr: 3 } : {};
  const font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const axis = { stroke: colour("soft"), font, grid: { stroke: colour("line"), width: 1 }, ticks: { show: false } };
  return {
    width: plot.clientWidth || 340, height: state.height, series, bands,
    legend: { show: false },
    padding: [8, 18, 0, 0],
    scales: {
      x: { time: false, range: (u, a, b) => (a === b ? [a - 1, b + 1] : [a, b]) },
      y: { ...scale, range: (u, a, b) => bounds(a, b, log) },
    },
    axes: [
      { ...axis, grid: { show: false }, size: 28, gap: 4, space: 70, incrs: view.x === "time" ? undefined : WHOLE, values: (u, marks) => marks.map((v) => AXES[view.x].tick(v)) },
      {
        ...axis, gap: 6, space: 34,
        size: (u, texts) => 14 + 6.9 * Math.max(3, ...(texts || []).map((t) => (t || "").length)),
        values: (u, marks) => marks.map((v) => (v === null ? "" : axisText(v, marks, chart.unit))),
      },
    ],
    cursor: {
      y: false, drag: { x: true, y: false, setScale: false },
      points: { size: 8, width: 0, fill: (u, i) => (u.series[i].width > 1 ? u.series[i].stroke(u, i) : "transparent") },
      sync: { key: "x", scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      bind: { dblclick: () => () => zoomTo(null) },
    },
    hooks: {
      setCursor: [(u) => read(u.cursor.left < 0 ? null : u.posToVal(u.cursor.left, "x"))],
      setSelect: [(u) => {
        if (u.select.width < 4) return;
        const left = u.posToVal(u.select.left, "x"), right = u.posToVal(u.select.left + u.select.width, "x");
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        zoomTo([left, right]);
      }],
      drawAxes: [(u) => resumes(u, state.curves)],
    },
  };
}

// Ticks of an axis share their digits.
function axisText(value, marks, unit) {
  const sizes = marks.filter((v) => v).map(Math.abs);
  if (unit !== "percent" && sizes.length && Math.min(...sizes) < 1e-3) {
    return value === 0 ? "0" : Number(value.toPrecision(3)).toExponential().replace(/-/g, "−");
  }
  const seen = marks.filter((v) => v !== null).map((v) => number(v, unit));
  const plain = seen.every((text) => /^−?[\d,]*\.?\d*%?$/.test(text));
  if (!plain) return number(value, unit);
  const scaled = unit === "percent" ? 100 : 1;
  const digits = Math.max(...seen.map((t) => ((t.match(/\.(\d*?)0*%?$/) || ["", ""])[1]).length));
  const text = (value * scaled).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return text.replace("-", "−") + (unit === "percent" ? "%" : "");
}

function bounds(low, high, log) {
  if (low === null || high === null) return [0, 1];
  if (log) return [low * 0.95, high * 1.05];
  const pad = high > low ? (high - low) * 0.07 : Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

// A dotted line where a run was resumed.
function resumes(u, curves) {
  const seen = new Set();
  u.ctx.save();
  u.ctx.strokeStyle = colour("soft");
  u.ctx.setLineDash([2, 4]);
  for (const { run } of curves) {
    for (const step of seen.has(run) || !run.train.step.length ? [] : run.resumed) {
      const x = Math.round(u.valToPos(xOf(run.train, step), "x", true));
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
    }
    seen.add(run);
  }
  u.ctx.restore();
}

// ---- zoom and keys

function zoomTo(range) {
  view.zoom = range;
  for (const { u } of plots) {
    const xs = u.data[0];
    const [min, max] = range || [xs[0], xs[xs.length - 1]];
    u.setScale("x", { min, max });
  }
  document.dispatchEvent(new Event("zoomed"));
}

// The cursor of all charts at x; null: none.
function pointAt(x) {
  for (const { u } of plots) {
    u.setCursor(x === null ? { left: -10, top: -10 } : { left: u.valToPos(x, "x"), top: u.over.clientHeight / 2 });
  }
}

function keys(event, state, read) {
  const u = state.u;
  if (!u) return;
  const { min, max } = u.scales.x;
  const longest = state.curves.reduce((a, one) => (one.x.length > a.length ? one.x : a), []);
  const xs = longest.filter((x) => x >= min && x <= max); // that are shown
  if (!xs.length) return;
  const big = Math.max(1, Math.round(xs.length / 10));
  const now = u.cursor.left >= 0 ? u.posToVal(u.cursor.left, "x") : xs[xs.length - 1];
  let i = xs.reduce((a, x, k) => (Math.abs(x - now) < Math.abs(xs[a] - now) ? k : a), 0);
  const by = event.shiftKey ? big : 1;
  if (event.key === "ArrowLeft" || event.key === "ArrowDown") i -= u.cursor.left >= 0 ? by : 0;
  else if (event.key === "ArrowRight" || event.key === "ArrowUp") i += by;
  else if (event.key === "PageDown") i -= big;
  else if (event.key === "PageUp") i += big;
  else if (event.key === "Home") i = 0;
  else if (event.key === "End") i = xs.length - 1;
  else if (event.key === "+" || event.key === "=") return stop(event, () => zoomTo([now - (now - min) / 2, now + (max - now) / 2]));
  else if (event.key === "-" || event.key === "0" || event.key === "Escape") return stop(event, () => zoomTo(null));
  else return;
  stop(event, () => {
    const x = xs[Math.min(Math.max(i, 0), xs.length - 1)];
    pointAt(x);
    read(x);
  });
}

function stop(event, act) {
  event.preventDefault();
  act();
}

// ---- tables and histograms

// Cells of a row; those from `from` on are numbers, and `path` is one of long text.
const cells = (tag, texts, from, path) => texts.map((text, i) =>
  make(tag, { class: i >= from ? "n" : i === path ? "any path" : null, scope: tag === "th" ? "col" : null }, text));

function valueTable(curves, chart) {
  const all = (some) => [...new Set(some.flatMap((one) => one.x))].sort((a, b) => a - b);
  const few = (xs) => { // of them, the first and the last included
    const count = Math.min(xs.length, 12);
    return Array.from({ length: count }, (_, i) => xs[Math.round((i * (xs.length - 1)) / Math.max(count - 1, 1))]);
  };
  // Of evaluations, which are fewer, too.
  const picked = [...new Set([...few(all(curves)), ...few(all(curves.filter((one) => one.held)))])].sort((a, b) => a - b);
  const rows = picked.map((x) => [AXES[view.x].text(x), ...curves.map((one) => {
    const i = one.x.indexOf(x);
    return number(i < 0 ? null : one.y[i], chart.unit);
  })]);
  const ends = ["lowest", "highest"].map((name, k) => [name, ...curves.map((one) => {
    const about = one.about;
    return about[2] === null ? "–" : `${number(about[2 + 2 * k], chart.unit)} at step ${whole(about[3 + 2 * k])}`;
  })]);
  return make("table", {}, make("thead", {}, make("tr", {}, cells("th", [AXES[view.x].name, ...curves.map((one) => one.label)], 1))),
    make("tbody", {}, [...rows, ...ends].map((row) => make("tr", {}, cells("td", row, 1)))));
}

// Bars between edges, for each of lists = [{label, index, counts}].
function histogram(title, unit, edges, lists, text, note, level = "h4") {
  const plot = make("div", { class: "plot", role: "img" });
  const most = lists.map((one) => {
    const i = one.counts.indexOf(Math.max(...one.counts));
    return `${one.label ? `${one.label}: ` : ""}most at ${text(edges[i])} to ${text(edges[i + 1])}`;
  });
  plot.setAttribute("aria-label", `Histogram of ${title}, ${most.join("; ")}`);
  const table = make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": `Counts of ${title}` });
  const details = make("details", { ontoggle: () => {
    if (!details.open || table.firstChild) return;
    const rows = edges.slice(0, -1).map((edge, i) => [`${text(edge)} – ${text(edges[i + 1])}`, ...lists.map((one) => number(one.counts[i]))]);
    table.append(make("table", {}, make("thead", {}, make("tr", {}, cells("th", [unit, ...lists.map((one) => one.label || "count")], 1))),
      make("tbody", {}, rows.map((row) => make("tr", {}, cells("td", row, 1))))));
  } }, make("summary", {}, "Values"), table);
  const legend = make("ul", { class: "legend" }, lists.length > 1 ? lists.map((one) => make("li", {}, swatch(one), make("span", { class: "name" }, one.label))) : [],
    note ? make("li", { class: "soft" }, note) : []);
  const made = make("figure", { class: "chart panel" }, make("figcaption", {}, make(level, { class: "title" }, title), make("span", { class: "unit" }, unit)), legend, plot, details);
  const state = { u: null };
  const draw = () => {
    if (state.u) state.u.destroy();
    const font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: colour("soft"), font, ticks: { show: false } };
    const bars = uPlot.paths.bars({ size: [0.92, 60], align: 1 });
    const series = lists.map((one) => ({
      stroke: line(one.index), width: lists.length > 1 ? 1.5 : 0, fill: faded(line(one.index), lists.length > 1 ? 0.3 : 0.75), paths: bars, points: { show: false },
    }));
    state.u = new uPlot({
      width: plot.clientWidth || 340, height: 185, series: [{}, ...series], legend: { show: false }, cursor: { show: false },
      padding: [8, 20, 0, 0],
      scales: { x: { time: false, range: [0, edges.length - 1] }, y: { range: (u, a, b) => [0, (b || 1) * 1.06] } },
      axes: [
        { ...axis, grid: { show: false }, size: 28, gap: 4, space: 60, incrs: [1, 2, 3, 4, 5, 6, 8, 10, 12, 20], values: (u, marks) => marks.map((i) => (Number.isInteger(i) && edges[i] !== undefined ? text(edges[i]) : "")) },
        { ...axis, grid: { stroke: colour("line"), width: 1 }, size: (u, texts) => 14 + 6.9 * Math.max(3, ...(texts || []).map((t) => t.length)), gap: 6, space: 34, values: (u, marks) => marks.map((v) => (Number.isInteger(v) ? number(v) : "")) },
      ],
    }, [edges.slice(0, -1).map((_, i) => i), ...lists.map((one) => one.counts)], plot);
  };
  new ResizeObserver(() => { if (state.u && plot.clientWidth) state.u.setSize({ width: plot.clientWidth, height: 185 }); }).observe(plot);
  return { element: made, draw };
}
