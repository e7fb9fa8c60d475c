// A trace token by token, by pointer and by keyboard.

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
