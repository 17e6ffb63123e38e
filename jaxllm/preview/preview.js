// SPDX-License-Identifier: Apache-2.0
// The page of a preview: the rows of an update, checks, counts, template.
const online = report.form === "prompts";
const train = report.sets[0];
const LEARNED = 1, SPECIAL = 2; // marks of a token

const percent = (share) => number(share, "percent");
const sum = (values) => values.reduce((total, value) => total + (value || 0), 0);
const kind = (mark) => (mark & LEARNED ? "learned" : "context");

// ---- headline

function tile(name, big, unit, sub) {
  return make("div", { class: "tile" }, make("dt", {}, name),
    make("dd", { class: "big" }, big, unit ? [" ", make("small", {}, unit)] : null), make("dd", { class: "sub" }, sub || ""));
}

const droppedOf = (source) => sum(Object.entries(source).filter(([key]) => key.startsWith("dropped_")).map(([, n]) => n));

function headline() {
  const sources = train.sources.filter((source) => source.examples !== null);
  const [examples, tokens, learned, read, cut] = ["examples", "tokens", "learned_tokens", "read", "truncated"].map((key) => sum(sources.map((s) => s[key])));
  const dropped = sum(sources.map(droppedOf));
  const found = report.findings.filter((one) => one.count);
  const of = online ? plural(report.batch_size, "completion") : `${plural(report.batch_size, "row")} of ${number(report.row_length)} tokens`;
  const epoch = report.epoch_steps ? `, an epoch is ${number(Number(report.epoch_steps.toPrecision(4)), "short")} steps` : "";
  const parts = [`${plural(report.steps, "step")} of ${of}${epoch}`, `tokenizer ${report.tokenizer}`, report.template && `chat template ${report.template.name}`, `data.max_length ${number(report.max_length)}`];
  const tiles = sources.length ? [
    tile("Training examples", number(examples), "", `${plural(train.sources.length, "source")}`),
    tile("Tokens", number(tokens), "", learned ? `${percent(learned / tokens)} learned` : ""),
    train.fill === null ? null : tile("Rows full", percent(train.fill), "", train.unpacked === null ? `${plural(train.rows, "row")}` : `${percent(train.unpacked)} without packing`),
    tile("Truncated", percent(cut / read), "", plural(cut, "example")),
    tile("Dropped", percent(dropped / read), "", plural(dropped, "example")),
    tile("Checks", found.length ? String(found.length) : "✓", "", found.length ? "found something" : "found nothing"),
  ] : [];
  return make("section", { id: "overview", class: "run" }, make("h1", {}, `Preview of ${report.objective}`), make("p", { class: "about" }, parts.filter(Boolean).join(" · ")),
    report.notes.map((note) => make("p", { class: "message stopped" }, make("span", {}, note))), tiles.length ? make("dl", { class: "tiles" }, tiles) : null);
}

// ---- rows

function barOf(row) {
  const made = make("span", { class: "bar-of", "aria-hidden": "true" });
  const add = (name, count, begins) => {
    const part = make("span", { class: begins ? `${name} begins` : name });
    part.style.width = `${(100 * count) / row.length}%`;
    made.append(part);
  };
  row.segments.forEach((segment, i) => segment.runs.forEach(([mark, count], k) => add(kind(mark), count, i > 0 && k === 0)));
  if (row.tokens < row.length) add("padding", row.length - row.tokens, false);
  return made;
}

// Tokens as elements; a line break has a sign, which is not copied.
function tokensOf(segment) {
  const made = make("p", { class: "tokens mono" });
  segment.texts.forEach((text, i) => {
    const mark = segment.marks[i];
    const one = make("span", { class: mark & SPECIAL ? `${kind(mark)} special` : kind(mark) });
    text.split("\n").forEach((piece, k) => {
      if (k) one.append(make("i", { "aria-hidden": "true" }, "↵"), "\n");
      one.append(piece);
    });
    one.place = i;
    made.append(one);
  });
  made.addEventListener("mouseover", (event) => {
    const one = event.target.closest("span");
    if (one && one.title === "") one.title = `${JSON.stringify(segment.texts[one.place])} = ${segment.ids[one.place].join(", ")}${segment.marks[one.place] & LEARNED ? ", learned" : ""}`;
  });
  return made;
}

function segmentOf(segment) {
  const weight = segment.weight === segment.learned ? "" : `, weight ${number(segment.weight)}`;
  const counts = online ? plural(segment.tokens, "token") : `${plural(segment.tokens, "token")}, ${number(segment.learned)} learned${weight}`;
  const label = segment.label ? [make("b", {}, segment.label), " · "] : [];
  return make("div", { class: "segment" }, make("p", { class: "who" }, label, `${segment.sources.join(", ")}: ${counts}`),
    segment.texts ? tokensOf(segment) : null);
}

function rowOf(row, open) {
  const counts = online ? plural(row.tokens, "token") : `${plural(row.tokens, "token")}, ${number(row.learned)} learned, ${number(row.length - row.tokens)} padding, ${plural(row.segments.length, "segment")}`;
  const body = make("div", {});
  const made = make("details", { class: "row-of panel", open, ontoggle: () => {
    if (made.open && !body.firstChild) body.append(...row.segments.map(segmentOf), row.segments.some((s) => s.texts) ? "" : make("p", { class: "hint" }, "The tokens of later rows are not in this page."));
  } }, make("summary", {}, make("b", {}, `${online ? "prompt" : "row"} ${row.row}`), online ? make("span", { class: "soft" }, row.segments[0].sources[0]) : barOf(row), make("span", { class: "counts" }, counts)), body);
  return made;
}

function rows() {
  const all = report.rows.map((row, i) => rowOf(row, i < 2));
  const tokens = sum(report.rows.map((row) => row.tokens)), length = sum(report.rows.map((row) => row.length)), learned = sum(report.rows.map((row) => row.learned));
  const about = online ? `${plural(all.length, "prompt")} of the rollout that update ${report.step} learns from, ${number(tokens)} tokens.`
    : `${plural(all.length, "row")} that update ${report.step} trains on: ${percent(tokens / length)} full, ${percent(learned / tokens)} of the tokens are learned.`;
  const item = (name, text) => make("li", {}, make("span", { class: `mark ${name}`, "aria-hidden": "true" }), text);
  const items = [item("learned", "learned (underlined)"), item("context", "context"), item("padding", "padding"), item("border", "segment begins"), make("li", { class: "soft" }, "Point at a token for its id.")];
  const toggle = make("button", { type: "button", onclick: () => { const open = !all.every((one) => one.open); all.forEach((one) => { one.open = open; }); } }, "Open or close all");
  return make("section", { id: "rows" }, make("h2", {}, `Update ${report.step}`), make("p", {}, about),
    online ? null : make("ul", { class: "legend marks" }, items), all.length > 2 ? toggle : null, all);
}

// ---- checks

function checks() {
  const made = make("section", { id: "checks" }, make("h2", {}, "Checks"));
  if (!report.findings.length) return make("section", { id: "checks" }, make("h2", {}, "Checks"), make("p", { class: "soft" }, "Streamed data are not checked."));
  const found = report.findings.filter((one) => one.count);
  const names = new Set(found.map((one) => one.name));
  const clean = [...new Set(report.findings.filter((one) => one.of).map((one) => one.name))].filter((name) => !names.has(name));
  const notes = report.findings.filter((one) => !one.of && one.note);
  const cards = found.map((one) => make("div", { class: "finding" },
    make("p", {}, make("b", {}, one.name), `, ${one.set}: `, make("span", { class: "count" }, `${number(one.count)} of ${number(one.of)} (${percent(one.count / one.of)})`), one.note ? `, ${one.note}` : ""),
    make("ul", {}, one.examples.map((example) => make("li", {}, make("span", { class: "where" }, example.other ? `${example.where} = ${example.other}: ` : `${example.where}: `), example.text)))));
  made.append(make("div", { class: "panel" }, cards,
    notes.map((one) => make("p", { class: "finding soft" }, `${one.name}: ${one.note}`)),
    clean.length ? make("p", { class: "finding good-line" }, `✓ None: ${clean.join(", ")}`) : null));
  return made;
}

// ---- data

function data() {
  const heads = ["set", "source", "examples", "tokens", "learned", "rows", "full", "dropped", "truncated"];
  const share = (count, of) => (count ? `${number(count)} (${percent(count / of)})` : "0");
  const body = report.sets.flatMap((set) => set.sources.map((source) => (source.examples === null
    ? row("td", [set.name, source.path, `${number(source.files)} files, streamed`, ...Array(6).fill("–")], 2, 1)
    : row("td", [set.name, source.path, number(source.examples), number(source.tokens), source.learned_tokens ? percent(source.learned_tokens / source.tokens) : "–",
      online ? "–" : number(source.rows), set.fill === null ? "–" : percent(set.fill), share(droppedOf(source), source.read), share(source.truncated, source.read)], 2, 1))));
  const notes = [...new Set(report.sets.flatMap((set) => set.sources.flatMap((source) => Object.entries(source.notes || {}).map(([note, n]) => `${source.path}: ${note} (${number(n)})`))))];
  const grid = make("div", { class: "grid" });
  grid.style.marginTop = "14px";
  report.sets.forEach((set, i) => {
    const lengths = set.lengths;
    if (!lengths || lengths.edges.length < 3) return; // all of one length
    const one = histogram(`Lengths: ${set.name}`, "tokens an example", lengths.edges, [{ label: "", index: i ? 1 : 0, counts: lengths.counts }], (v) => number(v),
      `${number(lengths.min)} to ${number(lengths.max)}, median ${number(lengths.median)}, 95% at most ${number(lengths.p95)}`, "h3");
    figures.push(one);
    grid.append(one.element);
  });
  return make("section", { id: "data" }, make("h2", {}, "Data"), make("div", { class: "panel" },
    scroll("Sources", make("table", {}, make("thead", {}, row("th", heads, 2)), make("tbody", {}, body))), notes.map((note) => make("p", { class: "hint" }, note))), grid);
}

// ---- template

function template() {
  const first = report.rows[0].segments[0];
  const made = make("section", { id: "template" }, make("h2", {}, report.template ? "Template" : "Record"));
  if (report.record !== null && first.texts) {
    made.append(make("div", { class: "two" },
      make("div", { class: "panel" }, make("h3", { class: "title" }, `The record: ${first.sources[0]}`), make("pre", { class: "text", tabIndex: 0, "aria-label": "Record" }, report.record)),
      make("div", { class: "panel" }, make("h3", { class: "title" }, "What the model sees of it"), tokensOf(first))));
  }
  if (report.template) {
    const details = make("details", { class: "panel" }, make("summary", {}, `Chat template (${report.template.name})`), make("pre", { class: "text", tabIndex: 0, "aria-label": "Chat template" }, report.template.source));
    details.style.marginTop = "14px";
    made.append(details);
  }
  return made;
}

document.getElementById("main").replaceChildren(headline(), rows(), checks(), data(), template());
frame([["rows", "Rows"], ["checks", "Checks"], ["data", "Data"], ["template", report.template ? "Template" : "Record"]]);
