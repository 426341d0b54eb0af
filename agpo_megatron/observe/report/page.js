"use strict";
// The page of a report: draws the charts and shows the samples. Text of the run reaches the page as text nodes alone.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function number(value, digits = 4) {
  return value === null || value === undefined ? "–" : String(Number(Number(value).toPrecision(digits)));
}

function table(id, heads, rows) {
  if (!rows.length) return;
  const head = make("tr");
  heads.forEach((text) => head.append(make("th", text)));
  at(id).append(head);
  for (const cells of rows) {
    const row = make("tr");
    cells.forEach((text) => row.append(make("td", text, "what")));
    at(id).append(row);
  }
}

function moment(seconds) {
  const d = new Date(seconds * 1000), two = (n) => String(n).padStart(2, "0");
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ` +
    `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
}

function showHead() {
  const facts = data.facts;
  at("name").textContent = facts.name;
  at("state").textContent = facts.state;
  at("state").className = facts.state;
  const about = [facts.mode, facts.preset && `preset ${facts.preset}`, `step ${facts.steps_done}` +
    (facts.steps ? ` of ${facts.steps}` : ""), facts.model && `from ${facts.model}`];
  at("about").textContent = about.filter(Boolean).join("  ·  ");
  at("because").textContent = facts.because;
  at("bar").style.width = facts.steps ? `${Math.min(100, 100 * facts.steps_done / facts.steps)}%` : "0";
  for (const card of data.cards) {
    const box = make("div");
    box.append(make("b", card.value), make("span", card.label));
    at("cards").append(box);
  }
  table("versions", ["package", "version"], Object.entries(facts.versions));
  const { before, after } = facts.summary, percent = (v) => (v === undefined || v === null ? "–" : `${(100 * v).toFixed(1)} %`);
  if (before || after) {
    const row = (label, key, form) => [label, form((before || {})[key]), form((after || {})[key])];
    table("summary", ["held-out", "before", "after"], [
      row("accuracy", "accuracy", percent),
      row("response tokens", "tokens_mean", number),
      row("tokens of right answers", "tokens_correct_mean", number)]);
  }
  table("attempts", ["attempt", "after step", "batches", "why it began"],
    data.attempts.map((a) => [a.number, a.after_step, a.batches, a.reason || "the logs do not say"]));
  table("events", ["when", "step", "what", "who", ""],
    data.events.map((e) => [moment(e.time), e.step ?? "–", e.kind, e.who, e.what]));
  if (data.events_left_out) at("left_out").textContent = `${data.events_left_out} older ones are left out.`;
  at("selection").textContent = data.selection;
  at("made").textContent = `agpo-megatron report, made ${data.made}. Metrics are explained in docs/metrics.md.`;
  if (!facts.steps_done) {
    at("empty").hidden = false;
    for (const id of ["curves", "time", "distributions"]) at(id).hidden = true;
    if (!data.samples.length) at("samples").hidden = true;
  }
  document.querySelectorAll("main section").forEach((section) => {
    const grid = section.querySelector(".grid");
    if (grid && !grid.children.length) section.hidden = true;
  });
}

function drawCharts() {
  document.querySelectorAll("[data-chart]").forEach((place) => {
    const { data: traces, layout } = data.charts[place.dataset.chart];
    Plotly.newPlot(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  });
}

// Samples

const samples = data.samples, largestGap = Math.max(0, ...samples.map((s) => s.gap || 0));
const ORDERS = {
  "as in the run": (a, b) => a.place - b.place,
  "newest first": (a, b) => b.step - a.step || a.place - b.place,
  "largest gap": (a, b) => (b.gap ?? -1) - (a.gap ?? -1),
  "highest reward": (a, b) => b.reward - a.reward,
  "lowest reward": (a, b) => a.reward - b.reward,
  "longest": (a, b) => b.length - a.length,
};
let chosen = null;

const mix = (a, b, t) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * t)).join(",")})`;
const WHITE = [255, 255, 255], RED = [226, 84, 72], GREEN = [72, 168, 118], BLUE = [88, 148, 214], VIOLET = [150, 112, 200];
// Gaps differ by powers of ten: two of them, below the largest, have a shade.
const gapShade = (gap) => Math.max(0, Math.min(1, 1 + Math.log10(Math.max(gap, 1e-12) / Math.max(largestGap, 1e-12)) / 2)) ** 1.5;
const largestAdvantage = Math.max(1e-9, ...samples.map((s) => Math.abs(s.advantage || 0)));

// Each gives the shade of a token, or null where nothing is known; and a legend of [text, colour].
const COLORS = {
  "log-prob gap": {
    shade: (s, t) => (t.gap === null ? null : mix(WHITE, RED, gapShade(Math.abs(t.gap)))),
    legend: (s) => s.scored
      ? [["|trainer − server|: " + number(largestGap / 100, 2), WHITE], [number(largestGap, 2) + " nats", RED]]
      : [["not known: the trainer's log-probs of this batch are not in the journal", null]],
  },
  "advantage": {
    shade: (s, t) => (!t.mask || s.advantage === null ? null
      : mix(WHITE, s.advantage < 0 ? RED : GREEN, Math.abs(s.advantage) / largestAdvantage)),
    legend: () => [["−" + number(largestAdvantage, 3), RED], ["0", WHITE], ["+" + number(largestAdvantage, 3), GREEN]],
  },
  "weight version": {
    shade: (s, t) => {
      if (t.step === null || s.started_from === null) return null;
      return mix([226, 238, 250], BLUE, Math.min(1, (s.started_from - t.step) / 4));
    },
    legend: () => [["made by the weights that the batch starts from", [226, 238, 250]], ["4 steps older, or more", BLUE]],
  },
  "server log-prob": {
    shade: (s, t) => (t.server === null ? null : mix(WHITE, VIOLET, Math.min(1, -t.server / 5))),
    legend: () => [["0 (certain)", WHITE], ["−5 nats or less", VIOLET]],
  },
};

function versionOf(sample, place) {
  let found = null;
  for (const version of sample.versions) if (version.start <= place) found = version;
  return found;
}

function between(value, low, high) {
  const a = at(low).value, b = at(high).value;
  return (a === "" || value >= Number(a)) && (b === "" || value <= Number(b));
}

function passes(s) {
  return between(s.step, "step_min", "step_max") && between(s.reward, "reward_min", "reward_max") &&
    between(s.length, "length_min", "length_max") && (!at("source").value || s.source === at("source").value.slice(1)) &&
    s.group.includes(at("group").value.trim()) && (!at("why").value || s.why.includes(at("why").value));
}

function showRows() {
  const found = samples.filter(passes).sort(ORDERS[at("order").value]);
  at("count").textContent = `${found.length} of ${samples.length} samples`;
  at("rows").replaceChildren(...found.map((s) => {
    const row = make("tr");
    row.append(make("td", s.step), make("td", s.id), make("td", number(s.reward, 3), s.correct ? "right" : "wrong"),
      make("td", number(s.advantage, 3)), make("td", s.length), make("td", number(s.gap, 2)));
    row.addEventListener("click", () => choose(s));
    row.sample = s;
    return row;
  }));
  if (!found.includes(chosen)) chosen = found[0] || null;
  choose(chosen);
}

function choose(sample) {
  chosen = sample;
  for (const row of at("rows").children) row.classList.toggle("chosen", row.sample === sample);
  showSample();
}

function showLegend() {
  at("legend").replaceChildren();
  if (!chosen) return;
  for (const [text, color] of COLORS[at("color").value].legend(chosen)) {
    if (color) {
      const swatch = make("i");
      swatch.style.background = mix(color, color, 0);
      swatch.style.width = "22px";
      at("legend").append(swatch);
    }
    at("legend").append(make("span", text));
  }
}

function showSample() {
  const place = at("sample"), s = chosen;
  place.replaceChildren();
  showLegend();
  if (!s) return place.append(make("p", "No sample passes these filters.", "quiet"));
  const numbers = make("div", null, "numbers");
  const add = (label, value) => {
    const one = make("div");
    one.append(make("span", label + " "), make("b", value));
    numbers.append(one);
  };
  add("sample", s.id); add("step", s.step); add("source", s.source || "–"); add("reward", number(s.reward));
  add("raw", number(s.raw)); add("advantage", number(s.advantage)); add("loss weight", number(s.weight));
  add("verdict", s.error ? "none" : s.correct ? "right" : "wrong"); add("tokens", s.length); add("ended by", s.finish);
  add("staleness", number(s.staleness)); add("largest gap", s.scored ? number(s.gap, 3) : "not journaled");
  add("chosen as", s.why.join(", "));
  for (const [name, value] of Object.entries(s.parts)) add(name, number(value));
  place.append(numbers);
  if (s.error) place.append(make("p", s.error, "wrong"));
  place.append(make("h4", "Prompt"), make("div", s.prompt || "(the journal has no text of it)", "text prompt"));
  place.append(make("h4", "Reference answer"), make("div", s.answer || "–", "text prompt"), make("h4", "Response"));
  const text = make("div", null, "text");
  let end = 0;
  for (const range of s.ranges) {
    if (range.start > end) text.append(make("span", `… ${range.start - end} tokens left out …`, "left-out"));
    range.ids.forEach((id, i) => text.append(token(s, range, id, i)));
    end = range.start + range.ids.length;
  }
  if (s.length > end) text.append(make("span", `… ${s.length - end} tokens left out …`, "left-out"));
  place.append(text);
}

function token(s, range, id, i) {
  const version = versionOf(s, range.start + i);
  const t = {
    gap: range.gaps ? range.gaps[i] : null, server: range.server[i] ?? null, mask: range.mask[i] !== 0,
    step: version ? version.step : null,
  };
  const element = make("span", range.texts ? range.texts[i] : id + " ", t.mask ? "token" : "token off");
  const shade = COLORS[at("color").value].shade(s, t);
  if (shade) element.style.background = shade;
  if (t.gap !== null && Math.abs(Math.abs(t.gap) - s.gap) <= 1e-5 * s.gap && s.gap > 0) element.classList.add("worst");
  element.title = [`token ${range.start + i}, id ${id}` + (t.mask ? "" : ", not generated by the policy"),
    `server ${number(t.server)}`,
    t.gap === null ? "trainer: not journaled" : `trainer ${number(t.server + t.gap)}, trainer − server ${number(t.gap, 3)}`,
    `weights ${version ? version.name : "unknown"}`].join("\n");
  return element;
}

function options(id, values, all) {
  if (all) at(id).append(new Option(all, ""));
  values.forEach(([text, value]) => at(id).append(new Option(text, value)));
}

function startViewer() {
  samples.forEach((s, place) => { s.place = place; });
  const sources = [...new Set(samples.map((s) => s.source))].sort();
  options("source", sources.map((name) => [name || "(none)", "=" + name]), "all");
  options("why", ["newest", "spread", "worst gap"].map((w) => [w, w]), "any");
  options("order", Object.keys(ORDERS).map((o) => [o, o]));
  options("color", Object.keys(COLORS).map((c) => [c, c]));
  at("order").value = "newest first";
  if (!samples.some((s) => s.scored)) at("color").value = "server log-prob";
  at("filters").addEventListener("input", showRows);
  at("color").addEventListener("input", showSample);
  at("reset").addEventListener("click", () => {
    at("filters").querySelectorAll("input").forEach((input) => { input.value = ""; });
    at("source").value = at("why").value = "";
    showRows();
  });
  showRows();
}

showHead();
drawCharts();
startViewer();
