"use strict";
// The facts, and small pieces that everything on the page is made of. Text of models goes into text nodes only, never into
// markup.

const report = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

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
