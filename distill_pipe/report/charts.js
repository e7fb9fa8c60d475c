// What is drawn of the facts: throughput, histograms, coverage.

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
