// Puts the page together.

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
