"use strict";
// Draws the page from the facts in #data. Text of models goes into text nodes only, never into markup.

const report = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

// --- small pieces ---------------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function bar(share) {
  const made = element("div", { className: "bar" });
  made.style.setProperty("--share", Math.min(Math.max(share, 0), 1));
  return made;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const percent = (share) => `${digits.format(share * 100)} %`;

function size(bytes) {
  for (const [unit, width] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (bytes >= width) return `${digits.format(bytes / width)} ${unit}`;
  return `${whole.format(bytes)} B`;
}

function duration(seconds) {
  if (seconds < 120) return `${digits.format(seconds)} s`;
  if (seconds < 7200) return `${digits.format(seconds / 60)} min`;
  return `${digits.format(seconds / 3600)} h`;
}

// Characters that would be invisible, or would reorder the text around them.
const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const code = (character) => `\u27e8${character.codePointAt(0).toString(16).padStart(2, "0")}\u27e9`;
const visible = (text) => text.replace(hidden, code);
const quoted = (text) => visible(text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u00b7"));

function ticks(most, count = 4) {
  const rough = most / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
}

// Charts are drawn for the width they have, so that their text keeps its size.
function responsive(box, label, draw) {
  let width = 0;
  new ResizeObserver(([entry]) => {
    const room = Math.round(entry.contentRect.width);
    if (room === width || room < 1) return;
    width = room;
    const svg = draw(width);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", label);
    box.replaceChildren(svg);
  }).observe(box);
}

function frame(width, height, left = 48) {
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height });
  return { svg, left, right: width - 8, top: 10, bottom: height - 24 };
}

function valueAxis(box, most, format) {
  const y = (value) => box.bottom - (value / (most || 1)) * (box.bottom - box.top);
  for (const tick of ticks(most))
    box.svg.append(
      drawn("line", { class: "grid-line", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      drawn("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  return y;
}

function below(box, x, text, anchor = "middle") {
  box.svg.append(drawn("text", { x, y: box.bottom + 16, "text-anchor": anchor }, text));
}

// --- charts ---------------------------------------------------------------------------------------------------------

function throughput(width) {
  const { steps } = report, last = steps.at(-1).stop;
  const rate = (step) => step.tokens / (step.stop - step.start);
  const box = frame(width, 210), y = valueAxis(box, Math.max(...steps.map(rate)), compact.format);
  const x = (seconds) => box.left + (seconds / last) * (box.right - box.left);
  const line = steps.map((s) => `L${x(s.start)} ${y(rate(s))}L${x(s.stop)} ${y(rate(s))}`).join("");
  box.svg.append(drawn("path", { class: "area", d: `M${x(0)} ${y(0)}${line}L${x(last)} ${y(0)}Z` }));
  for (const step of steps) {
    const failed = step.quarantined ? `\n${whole.format(step.quarantined)} prompts given up on` : "";
    box.svg.append(drawn("rect", {
      class: "catch", x: x(step.start), width: x(step.stop) - x(step.start), y: box.top, height: box.bottom - box.top,
      "data-tip": `${compact.format(rate(step))} tokens/s\n${whole.format(step.prompts)} prompts, ${duration(step.start)}`
        + ` to ${duration(step.stop)}${failed}` }));
    if (step.quarantined)
      box.svg.append(drawn("circle", { class: "failed", cx: x((step.start + step.stop) / 2), cy: box.bottom, r: 4 }));
  }
  const marks = ticks(last, Math.max(2, Math.floor(width / 160)));
  marks.forEach((tick, i) => below(box, x(tick), duration(tick), i ? "middle" : "start"));
  return box.svg;
}

function edge(scale, value) {
  if (scale === "log10") return value < 0.001 ? value.toExponential(0) : String(Number(value.toPrecision(2)));
  return scale === "linear" ? digits.format(value) : compact.format(Math.round(value));
}

// A whole power, which a reader can place; on a linear scale any edge.
function isRound(scale, value) {
  const power = scale === "log10" ? Math.log10(value) : Math.log2(value);
  return scale === "linear" || Math.abs(power - Math.round(power)) < 1e-9;
}

function histogram(shown) {
  const { bars, scale } = shown, total = bars.reduce((sum, b) => sum + b.count, 0);
  const most = Math.max(...bars.map((b) => b.count)) / total;
  const first = bars.findIndex((b) => b.count), kept = bars.slice(first);
  return (width) => {
    const box = frame(width, 170), y = valueAxis(box, most, percent);
    const room = (box.right - box.left) / kept.length;
    let free = box.left;
    kept.forEach((b, i) => {
      const share = b.count / total, x = box.left + i * room;
      const range = `${first + i || scale !== "log10" ? edge(scale, b.low) : "0"} to ${edge(scale, b.high)}`;
      box.svg.append(
        drawn("rect", { class: "column", x: x + 0.5, width: Math.max(room - 1, 1), y: y(share), height: box.bottom - y(share), rx: 1 }),
        drawn("rect", { class: "catch", x, width: room, y: box.top, height: box.bottom - box.top,
          "data-tip": `${range}\n${whole.format(b.count)} ${shown.counted}, ${percent(share)}` }));
      if (x < free || !isRound(scale, b.low)) return;
      below(box, x, edge(scale, b.low), i ? "middle" : "start");
      free = x + 46;
    });
    return box.svg;
  };
}

function coverage(width) {
  const points = report.coverage, least = Math.log2(points[0].size), span = Math.log2(points.at(-1).size) - least;
  const box = frame(width, 230), y = valueAxis(box, 1, percent);
  const x = (count) => box.left + ((Math.log2(count) - least) / (span || 1)) * (box.right - box.left);
  const path = (of) => points.map((p, i) => `${i ? "L" : "M"}${x(p.size)} ${y(p[of])}`).join("");
  box.svg.append(drawn("path", { class: "line second", d: path("tokens") }), drawn("path", { class: "line", d: path("mass") }));
  points.forEach((p, i) => {
    const from = i ? x(points[i - 1].size) : box.left, to = x(p.size);
    box.svg.append(drawn("rect", { class: "catch", x: from, width: to - from, y: box.top, height: box.bottom - box.top,
      "data-tip": `${whole.format(p.size)} tokens cover\n${percent(p.mass)} of the probability\n${percent(p.tokens)} of the tokens` }));
  });
  for (let power = Math.ceil(least); power <= least + span; power += width > 600 ? 2 : 4)
    below(box, x(2 ** power), compact.format(2 ** power), power === least ? "start" : "middle");
  return box.svg;
}

document.addEventListener("pointermove", (event) => {
  const told = event.target.closest?.("[data-tip]")?.dataset.tip;
  const tip = at("tip");
  tip.hidden = !told;
  if (!told) return;
  tip.textContent = told;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
});

// --- the token viewer -----------------------------------------------------------------------------------------------

const measures = [
  { name: "entropy of the target", of: (row) => row.entropy, most: 5, unit: "nats" },
  { name: "mass outside the head", of: (row) => row.tail_mass, most: 0.5, unit: "" },
  { name: "surprise: \u2212log p of the token", of: (row) => -row.next_logprob, most: 8, unit: "nats" },
];
const view = { trace: 0, measure: 0, current: null };
const text = (id) => report.token_text[id];

function showTrace() {
  const trace = report.viewed[view.trace];
  at("tokens").replaceChildren(...trace.tokens.map(tokenSpan));
  at("trace-note").textContent = `Prompt ${visible(trace.prompt_id)}, ${whole.format(trace.num_tokens)} tokens`
    + (trace.tokens.length < trace.num_tokens ? `, of which the first ${whole.format(trace.tokens.length)} are shown` : "")
    + `; ended by ${trace.finish_reason}. Entropy is estimated from the head and the tail samples; the bounds hold for `
    + "any tail of the stored mass. Tokens without a shade are the prompt.";
  shade();
  const first = at("tokens").querySelector(".supervised") ?? at("tokens").firstElementChild;
  // The prompt's end stays in sight above the first token that has a shade.
  at("tokens").scrollTop = first.offsetTop - 110;
  choose(first, false);
}

function tokenSpan(token, place) {
  const span = element("span", { className: token.row ? "token supervised" : "token", tabIndex: -1 });
  span.dataset.place = place;
  span.setAttribute("role", "option");
  for (const part of visible(text(token.token_id)).split(/(\n)/))
    span.append(...(part === "\n" ? [element("span", { className: "mark", textContent: "\u21b5" }), "\n"] : [part]));
  return span;
}

function shade() {
  const { of, most, unit } = measures[view.measure], { tokens } = report.viewed[view.trace];
  [...at("tokens").children].forEach((span, place) => {
    const { row, token_id: id } = tokens[place];
    if (row) span.style.setProperty("--shade", Math.min(Math.max(of(row) / most, 0), 1).toFixed(3));
    span.setAttribute("aria-label", quoted(text(id)) + (row ? `, ${digits.format(of(row))} ${unit}` : ", not supervised"));
  });
  at("scale-low").textContent = "0";
  at("scale-high").textContent = `${most} ${unit} or more`;
}

function choose(span, focus) {
  if (!span) return;
  for (const old of at("tokens").querySelectorAll(".current")) {
    old.classList.remove("current");
    old.tabIndex = -1;
    old.setAttribute("aria-selected", "false");
  }
  span.classList.add("current");
  span.tabIndex = 0;
  span.setAttribute("aria-selected", "true");
  view.current = span;
  if (focus) span.focus();
  showRow(report.viewed[view.trace].tokens[Number(span.dataset.place)]);
}

function showRow({ token_id: id, row }) {
  const heading = element("p", { className: "context", textContent: quoted(text(id)) });
  if (!row) {
    at("row").replaceChildren(heading, element("p", { textContent: "Not supervised: a draft only reads this token." }));
    return;
  }
  const numbers = `probability ${percent(Math.exp(row.next_logprob))}, entropy ${digits.format(row.entropy)} nats (between `
    + `${digits.format(row.entropy_low)} and ${digits.format(row.entropy_high)})`;
  const items = row.candidates.map(([candidate, p]) => candidateItem(quoted(text(candidate)), p, candidate === id && "chosen"));
  const more = row.head_entries - row.candidates.length;
  if (more > 0) items.push(candidateItem(`${more} more stored`, row.head_left, "rest"));
  items.push(candidateItem("outside the head", row.tail_mass, "rest"));
  at("row").replaceChildren(heading, element("p", { className: "numbers", textContent: numbers }),
    element("ul", { className: "candidates" }, ...items));
}

function candidateItem(name, p, kind) {
  return element("li", { className: kind || "" }, element("span", { className: "name", textContent: name, title: name }),
    bar(p), element("span", { textContent: percent(p) }));
}

// The token above or below: the nearest one on the next line.
function onLine(span, down) {
  const spans = [...at("tokens").children], sign = down ? 1 : -1;
  const beyond = spans.filter((s) => sign * (s.offsetTop - span.offsetTop) > 4);
  if (!beyond.length) return span;
  const line = down ? beyond[0].offsetTop : beyond.at(-1).offsetTop;
  return beyond.filter((s) => Math.abs(s.offsetTop - line) <= 4)
    .reduce((best, s) => Math.abs(s.offsetLeft - span.offsetLeft) < Math.abs(best.offsetLeft - span.offsetLeft) ? s : best);
}

const keys = {
  ArrowRight: (span) => span.nextElementSibling, ArrowLeft: (span) => span.previousElementSibling,
  ArrowDown: (span) => onLine(span, true), ArrowUp: (span) => onLine(span, false),
  Home: (span) => span.parentElement.firstElementChild, End: (span) => span.parentElement.lastElementChild,
};

function viewer() {
  if (!report.viewed.length) {
    at("traces").hidden = true;
    return;
  }
  at("trace").append(...report.viewed.map((t, i) => element("option", { value: i, textContent:
    `${t.ordinal}${t.domain ? ` \u00b7 ${visible(t.domain)}` : ""} \u00b7 ${whole.format(t.num_tokens)} tokens` })));
  at("measure").append(...measures.map((m, i) => element("option", { value: i, textContent: m.name })));
  at("trace").addEventListener("change", () => { view.trace = at("trace").selectedIndex; showTrace(); });
  at("measure").addEventListener("change", () => { view.measure = at("measure").selectedIndex; shade(); });
  for (const kind of ["pointerover", "click"])
    at("tokens").addEventListener(kind, (event) => choose(event.target.closest(".token"), kind === "click"));
  at("tokens").addEventListener("keydown", (event) => {
    const next = keys[event.key]?.(view.current);
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(next, true);
  });
  showTrace();
}

// --- the page -------------------------------------------------------------------------------------------------------

function pairs(list, facts) {
  for (const [name, value] of facts)
    list.append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
}

function head() {
  const { shards, shards_done: done, traces, tokens, rows, bytes, quarantined } = report;
  document.title = `${visible(report.target)} \u00b7 distill-pipe`;
  at("target").textContent = visible(report.target);
  at("state").textContent = (done === shards ? `Complete: ${whole.format(shards)} shards. `
    : `${whole.format(done)} of ${whole.format(shards)} shards. `) + `Fingerprint ${report.fingerprint.slice(0, 12)}`;
  pairs(at("figures"), [
    ["traces", compact.format(traces)], ["tokens", compact.format(tokens)], ["supervised rows", compact.format(rows)],
    ["on disk", size(bytes)], ["per token", tokens ? size(bytes / tokens) : "\u2013"],
    ["outside the head", rows ? percent(report.tail_mass_mean) : "\u2013"], ["given up on", whole.format(quarantined)]]);
}

function columnTable() {
  const most = report.columns[0]?.bytes;
  at("bytes-note").textContent = report.sampled_shards < report.shards_done
    ? `Measured in ${report.sampled_shards} of ${whole.format(report.shards_done)} shards, scaled to all of them.`
    : "As stored, compressed.";
  at("columns").append(...report.columns.map(({ column, bytes }) => element("tr", {},
    element("th", { textContent: visible(column), scope: "row" }), element("td", { className: "wide" }, bar(bytes / most)),
    element("td", { className: "number", textContent: size(bytes) }),
    element("td", { className: "number", textContent: `${digits.format(bytes / report.tokens)} B/token` }))));
}

function reasonTable() {
  if (!report.quarantined) {
    at("reasons").append(element("p", { textContent: "None." }));
    return;
  }
  const row = (reason) => element("tr", {}, element("th", { textContent: visible(reason.code), scope: "row" }),
    element("td", { className: "number", textContent: whole.format(reason.prompts) }),
    element("td", { textContent: visible(reason.message) }));
  const names = element("tr", {}, element("th", { textContent: "reason" }),
    element("th", { textContent: "prompts", className: "number" }), element("th", { textContent: "the first message" }));
  at("reasons").append(element("table", {}, element("thead", {}, names),
    element("tbody", {}, ...report.reasons.map(row))));
  if (report.sampled_shards < report.shards_done)
    at("reasons").append(element("p", { className: "note", textContent:
      `Counted in ${report.sampled_shards} shards; ${whole.format(report.quarantined)} prompts in all.` }));
}

function charts() {
  for (const shown of report.distributions.filter((d) => d.bars.length)) {
    const box = element("div", { className: "chart" });
    at("histograms").append(element("figure", {}, element("figcaption", {}, element("h3", { textContent: shown.title }),
      element("p", { textContent: shown.note })), box));
    responsive(box, `${shown.title}: ${shown.note}`, histogram(shown));
  }
  at("time").hidden = !report.steps.length;
  if (report.steps.length) {
    at("time-note").textContent = "Tokens per second between commits, from the times of the shards' records: of a dataset "
      + "that was copied, these are the times of the copy. A dot marks prompts that were given up on.";
    responsive(at("throughput"), "Tokens per second over time", throughput);
  }
  at("vocabulary").hidden = !report.coverage.length;
  if (report.coverage.length) {
    at("coverage").before(element("p", { className: "legend" }, element("span", { textContent: "probability" }),
      element("span", { className: "second", textContent: "tokens" })));
    responsive(at("coverage"), "Share covered by draft vocabularies of growing size", coverage);
  }
  for (const [id, filled] of [["distributions", report.rows], ["bytes", report.columns.length]]) at(id).hidden = !filled;
}

head();
viewer();
charts();
columnTable();
reasonTable();
for (const [name, value] of Object.entries(report.run))
  at("facts").append(element("dt", { textContent: name }), element("dd", { textContent: visible(value) }));
