"""trace.html: one self-contained page about a trace (analysis.Trace)."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

PAGE_TOP = 10  # likeliest tokens of a step in the page


def write_page(trace, file: Path) -> None:
    """trace.html: one file that needs nothing else."""
    # In a JSON block only "<" could end the block; escaped, the text is the same to JSON.parse.
    block = json.dumps(page_data(trace), allow_nan=False).replace("<", "\\u003c")
    file.write_text(PAGE.replace("__DATA__", block), encoding="utf-8")


def page_data(trace) -> dict:
    """What the page shows, as JSON."""
    meta, tops, mixtures = trace.meta, [], []
    for ids, logps in zip(trace["topk_ids"][:, :PAGE_TOP].tolist(), trace["topk_logp"][:, :PAGE_TOP], strict=True):
        tops.append([[trace.label(token), number(logp), token] for token, logp in zip(ids, logps, strict=True)])
    for t, soft in enumerate(trace["is_soft"].tolist()):
        total = Counter()  # equal draws added up
        for draw, weight in zip(trace["draws"][t].tolist(), trace["weights"][t].tolist(), strict=True):
            total[draw] += weight * soft
        mixtures.append([[trace.label(draw), round(weight, 4)] for draw, weight in total.most_common() if weight > 0])
    spelled = [trace.spelling[token] for token in trace["token_ids"].tolist()]
    columns = {
        "text": trace.labels,
        "bytes": [" ".join(f"{byte:02x}" for byte in piece or b"") for piece in spelled],
        "id": trace["token_ids"].tolist(),
        "part": trace.parts,
        "logp": [number(logp) for logp in trace["logp"]],
        "rank": trace["rank"].tolist(),
        "entropy": [number(value) for value in trace["entropy"]],
        "varentropy": [number(value) for value in trace["varentropy"]],
        "n95": trace["n95"].tolist(),
        "weight": [number(value) for value in trace["top_weight"]],
        "fork": trace.forks.tolist(),
        "forced": trace["forced"].tolist(),
        "top": tops,
        "mixture": mixtures,
    }
    keys = ("model", "temperature", "seed", "vocab_size", "prompt", "finish", "answer", "gold", "forced_forks")
    # Certain tokens look like the page; the further from certain, the further the colour is from the page's.
    light, dark = ([to_hex(colormaps["magma"](x)) for x in np.linspace(*ends, 16)] for ends in ((0.98, 0.12), (0.1, 1)))
    scales = {"light": ["#ffffff", *light], "dark": ["#15171c", *dark]}
    return {"meta": {key: meta[key] for key in keys}, "columns": columns, "scales": scales}


def number(value, floor: float = -9999.0) -> float:
    """For JSON, which knows no infinity: six digits, and log-probs not below `floor`."""
    return float(f"{max(float(value), floor):.6g}")


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Token probabilities</title>
<style>
:root {
  color-scheme: light dark;
  --page: light-dark(#ffffff, #15171c); --ink: light-dark(#1c1e21, #e4e6ea); --soft-ink: light-dark(#5c636b, #9aa2ad);
  --line: light-dark(#d9dde2, #343a44); --panel: light-dark(#f5f7f9, #1d2027); --bar: light-dark(#0072b2, #56b4e9);
  --mark: light-dark(#d55e00, #ff8c42);
  --reasoning: light-dark(#e6f0fa, #1c2b3a); --answer: light-dark(#fdeee2, #3a2a1c);
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.5rem 3rem; max-width: 84rem; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.35rem; margin: 0; }
h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
header { display: flex; gap: 1rem; align-items: baseline; justify-content: space-between; }
.facts { color: var(--soft-ink); margin: .1rem 0 .8rem; overflow-wrap: anywhere; }
button, input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
                border-radius: 4px; padding: .15rem .6rem; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; align-items: center; margin-bottom: .7rem; }
.controls fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: .3rem .9rem; flex-wrap: wrap; }
.controls legend { float: left; margin-right: .9rem; color: var(--soft-ink); }
.legend { display: flex; align-items: center; gap: .5rem; font-size: .85rem; color: var(--soft-ink); }
#gradient { width: 9rem; height: .8rem; border: 1px solid var(--line); border-radius: 3px; }
main { display: grid; grid-template-columns: minmax(0, 1fr) 25rem; gap: 1.5rem; align-items: start; }
@media (max-width: 60rem) { main { grid-template-columns: minmax(0, 1fr); } }
#text { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/2 ui-monospace, "DejaVu Sans Mono", monospace;
        padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px; max-height: 60vh; overflow-y: auto; }
.token { padding: .15em 0; border-radius: 2px; cursor: pointer; }
.token.fork { border-bottom: 2px dotted var(--mark); }
.token.found { text-decoration: underline 3px var(--bar); text-underline-offset: 4px; }
.token.current { outline: 2px solid var(--bar); outline-offset: 1px; }
.token.pinned { outline: 3px solid var(--mark); }
:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
#strip { width: 100%; height: 5rem; display: block; cursor: pointer; border-bottom: 1px solid var(--soft-ink); }
#strip .bars { fill: var(--bar); } #strip .forks { fill: var(--mark); } #strip .here { fill: var(--ink); opacity: .25; }
#strip .reasoning { fill: var(--reasoning); } #strip .answer { fill: var(--answer); }
.ends { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft-ink); }
aside { position: sticky; top: 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
        padding: .8rem 1rem; min-height: 31rem; }
aside h2 { margin: 0; font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(4, 1fr); gap: .3rem; margin: .5rem 0 .8rem; }
dt { font-size: .78rem; color: var(--soft-ink); } dd { margin: 0; font-variant-numeric: tabular-nums; }
aside p { margin: .2rem 0 .6rem; font-size: .88rem; color: var(--soft-ink); }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft-ink); }
td { text-align: right; padding: .1rem .3rem; border-top: 1px solid var(--line); }
th { padding: .1rem .3rem; }
th, td { white-space: nowrap; }
.name { text-align: left; white-space: normal; overflow-wrap: anywhere;
        font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.bar { width: 4.5rem; } .bar div { height: .75em; background: var(--bar); min-width: 1px; }
.chosen { font-weight: 700; } .chosen .bar div { background: var(--mark); }
#forks tbody tr { cursor: pointer; } #forks tbody tr:hover { background: var(--panel); }
#forks button { border: 0; background: none; padding: 0; text-decoration: underline; cursor: pointer; }
details { margin-top: 1.2rem; }
.scroll { max-height: 30rem; overflow-y: auto; }
.token, .name, .other, #name { unicode-bidi: isolate; }
.other { margin-right: 1.2em; } .other small { color: var(--soft-ink); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .8rem; border-radius: 6px; }
</style>
</head>
<body>
<header><h1>Token probabilities</h1><button id="theme" type="button">Dark / light</button></header>
<p class="facts" id="facts"></p>
<div class="controls">
  <fieldset id="modes"><legend>Colour</legend></fieldset>
  <div class="legend"><span id="low"></span><span id="gradient"></span><span id="high"></span></div>
  <label><input type="checkbox" id="spaces"> visible white space</label>
  <label>Search <input type="search" id="search" size="14"></label><span id="found" role="status"></span>
</div>
<main>
  <div>
    <div id="text" role="listbox" tabindex="0" aria-label="Tokens of the answer"></div>
    <p class="facts">Hover, or move with the arrow keys, Home and End. Click or Enter pins a token, Escape lets it go.
      In the search field, Enter goes to the next match. Dotted line: a fork (entropy in the highest fifth).</p>
    <div class="ends"><span id="highest"></span><span id="parts"></span></div>
    <svg id="strip" preserveAspectRatio="none" role="img" aria-label="Entropy of each step"></svg>
    <div class="ends"><span>step 0</span><span id="last"></span></div>
  </div>
  <aside aria-live="polite"><h2 id="name"></h2><p id="kind"></p><dl id="numbers"></dl>
    <table id="top"><thead><tr><th></th><th class="name">token</th><th></th><th>p</th><th>ln p</th><th>Σ p</th></tr>
    </thead><tbody></tbody></table><p id="mixture"></p></aside>
</main>
<h2>Forks, the most uncertain first</h2>
<div class="scroll"><table id="forks">
  <thead><tr><th>step</th><th class="name">token</th><th>p</th><th>entropy (nats)</th>
  <th class="name">likeliest others</th><th>answer changes with the runner-up (with the token itself)</th></tr></thead>
  <tbody></tbody></table></div>
<details><summary>Prompt</summary><pre id="prompt"></pre></details>
<script type="application/json" id="data">__DATA__</script>
<script>
"use strict";
const { meta, columns, scales } = JSON.parse(document.getElementById("data").textContent);
const T = columns.text.length;
const get = (id) => document.getElementById(id);

// Everything that the model wrote goes through here: as text, never as markup.
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
// Control characters are written out: some show nothing, some turn the direction of the text around them.
const controls = /[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const printed = (text) => text.replace(controls, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
const visible = (text) => printed(text).replaceAll(" ", "·").replaceAll("\t", "⇥").replaceAll("\n", "↵");
const short = (x) => (x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toFixed(3));
const percent = (x) => (100 * x).toFixed(0) + " %";

// ---- colour: each mode gives every step a level from 0 (as the page) to 1

const maxEntropy = Math.max(...columns.entropy, 0.01);
const modes = {
  probability: { level: (i) => -columns.logp[i] / Math.LN10 / 4, low: "p = 1", high: "0.0001 or less" },
  entropy: { level: (i) => columns.entropy[i] / maxEntropy, low: "0", high: maxEntropy.toFixed(2) + " nats" },
  rank: { level: (i) => Math.log10(columns.rank[i]) / 3, low: "rank 1", high: "1000 or more" },
  "soft weight": { level: (i) => 1 - columns.weight[i], low: "weight 1", high: "0" },
};
let mode = "probability";

function isDark() {
  const chosen = document.documentElement.style.colorScheme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function rgb(level, scale) {
  const place = Math.min(Math.max(level, 0), 1) * (scale.length - 1);
  const from = Math.min(Math.floor(place), scale.length - 2);
  const channel = (hex, c) => parseInt(hex.slice(1 + 2 * c, 3 + 2 * c), 16);
  const mix = (c) => channel(scale[from], c) + (place - from) * (channel(scale[from + 1], c) - channel(scale[from], c));
  return [0, 1, 2].map(mix);
}

function luminance(color) {  // relative, as in WCAG
  const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function paint() {
  const scale = scales[isDark() ? "dark" : "light"];
  spans.forEach((span, i) => {
    const color = rgb(modes[mode].level(i), scale);
    span.style.backgroundColor = `rgb(${color.map(Math.round).join(" ")})`;
    span.style.color = luminance(color) > 0.179 ? "#000" : "#fff";  // the one with more contrast
  });
  get("gradient").style.background = `linear-gradient(to right, ${scale.join(", ")})`;
  get("low").textContent = modes[mode].low;
  get("high").textContent = modes[mode].high;
}

// ---- the text

const spans = columns.text.map((text, i) => {
  const span = make("span", "token" + (columns.fork[i] ? " fork" : ""), printed(text));
  span.id = "token" + i;
  span.dataset.step = i;
  span.setAttribute("role", "option");
  return span;
});
get("text").append(...spans);

function writeText() {
  const marked = get("spaces").checked;
  spans.forEach((span, i) => {
    const text = columns.text[i];
    span.textContent = marked ? visible(text).replaceAll("↵", "↵\n") : printed(text);
  });
}

// ---- the current token, and everything that shows it

let current = 0, pinned = false;

function select(i, pin = pinned) {
  for (const name of ["current", "pinned"]) spans[current].classList.remove(name);
  spans[current].setAttribute("aria-selected", "false");
  current = Math.min(Math.max(i, 0), T - 1);
  pinned = pin;
  spans[current].classList.add("current");
  spans[current].classList.toggle("pinned", pinned);
  spans[current].setAttribute("aria-selected", "true");
  get("text").setAttribute("aria-activedescendant", "token" + current);
  here.setAttribute("x", current);
  describe(current);
}

function describe(i) {
  const kind = [columns.part[i], columns.fork[i] && "fork", columns.forced[i] && "forced"].filter(Boolean).join(", ");
  get("name").textContent = visible(columns.text[i]) || "(nothing)";
  get("kind").textContent =
    `step ${i} of ${T}${kind && ", " + kind}; id ${columns.id[i]}, bytes ${columns.bytes[i] || "none"}`;
  const numbers = {
    p: short(Math.exp(columns.logp[i])), "ln p": columns.logp[i].toFixed(3), rank: columns.rank[i],
    "H (nats)": columns.entropy[i].toFixed(3), "H (bits)": (columns.entropy[i] / Math.LN2).toFixed(3),
    varentropy: columns.varentropy[i].toFixed(3), n95: columns.n95[i], "top weight": columns.weight[i].toFixed(2),
  };
  const pairs = Object.entries(numbers).map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", value));
    return pair;
  });
  get("numbers").replaceChildren(...pairs);
  let sum = 0;
  const rows = columns.top[i].map(([text, logp, id], rank) => {
    sum += Math.exp(logp);
    return topRow(rank + 1, text, logp, sum, id === columns.id[i]);
  });
  if (!columns.top[i].some(([, , id]) => id === columns.id[i]))
    rows.push(topRow(columns.rank[i], columns.text[i], columns.logp[i], null, true));
  get("top").tBodies[0].replaceChildren(...rows);
  const mixture = columns.mixture[i].map(([text, weight]) => `${weight.toFixed(2)} ${visible(text)}`);
  get("mixture").textContent = mixture.length ? "Fed as a mixture: " + mixture.join(" + ") : "";
}

function topRow(rank, text, logp, sum, isChosen) {
  const row = make("tr", isChosen ? "chosen" : "");
  const bar = make("td", "bar");
  bar.append(make("div"));
  bar.firstChild.style.width = 100 * Math.exp(logp) + "%";
  row.append(make("td", "", rank), make("td", "name", visible(text) + (isChosen ? " ✓" : "")), bar,
    make("td", "", short(Math.exp(logp))), make("td", "", logp.toFixed(2)), make("td", "", sum ? sum.toFixed(3) : ""));
  return row;
}

// ---- the entropy strip

const strip = get("strip");
strip.setAttribute("viewBox", `0 0 ${T} 100`);

function shape(tag, className, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  element.setAttribute("class", className);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  strip.append(element);
  return element;
}
columns.part.forEach((part, i) => part && shape("rect", part, { x: i, y: 0, width: 1.02, height: 100 }));
const bars = (isFork) => columns.entropy.map((h, i) =>
  columns.fork[i] === isFork ? `M${i + 0.08} 100V${100 - (94 * h) / maxEntropy}H${i + 0.92}V100Z` : "").join("");
shape("path", "bars", { d: bars(false) });
shape("path", "forks", { d: bars(true) });
const here = shape("rect", "here", { y: 0, width: 1, height: 100 });
const stepAt = (event) => Math.floor(((event.clientX - strip.getBoundingClientRect().left) / strip.clientWidth) * T);
get("highest").textContent = `entropy, 0 to ${maxEntropy.toFixed(2)} nats`;
get("parts").textContent = columns.part.some(Boolean) ? "tinted: reasoning (blue), answer (orange)" : "";
get("last").textContent = `step ${T - 1}`;

// ---- forks, search, the head of the page

const forced = new Map(meta.forced_forks.map((fork) => [fork.step, fork]));
const forkSteps = columns.fork.flatMap((isFork, i) => (isFork ? [i] : []));
forkSteps.sort((a, b) => columns.entropy[b] - columns.entropy[a]);
for (const i of forkSteps) {
  const row = make("tr"), button = make("button", "", i), step = make("td");
  const others = columns.top[i].filter(([, , id]) => id !== columns.id[i]).slice(0, 3);
  const tried = forced.get(i);
  const likeliest = make("td", "name");
  for (const [text, logp] of others) {
    const other = make("span", "other", visible(text) + " ");
    other.append(make("small", "", short(Math.exp(logp))));
    likeliest.append(other);
  }
  button.type = "button";
  step.append(button);
  row.append(step, make("td", "name", visible(columns.text[i])), make("td", "", short(Math.exp(columns.logp[i]))),
    make("td", "", columns.entropy[i].toFixed(3)), likeliest,
    make("td", "", tried ? `${percent(tried.changed_with_runner_up)} (${percent(tried.changed_with_token)})` : ""));
  row.addEventListener("click", () => goTo(i, true));
  get("forks").tBodies[0].append(row);
}

let matches = [];
function search() {
  const query = get("search").value.toLowerCase();
  const ends = [];
  columns.text.reduce((end, text) => (ends.push(end + text.length), end + text.length), 0);
  const text = columns.text.join("").toLowerCase();
  spans.forEach((span) => span.classList.remove("found"));
  matches = [];
  for (let at = query ? text.indexOf(query) : -1; at >= 0; at = text.indexOf(query, at + 1)) {
    const first = ends.findIndex((end) => end > at);
    matches.push(first);
    for (let i = first; i < T && (i === first || ends[i - 1] < at + query.length); i++) spans[i].classList.add("found");
  }
  get("found").textContent = query ? `${matches.length} found` : "";
}

function goTo(i, pin = pinned) {
  select(i, pin);
  spans[current].scrollIntoView({ block: "nearest" });
}

const rightness = meta.gold === null ? "" : `, the right one is ${meta.gold}`;
get("facts").textContent =
  `${meta.model}, temperature ${meta.temperature}, seed ${meta.seed}, ${T} tokens of a vocabulary of ` +
  `${meta.vocab_size}, finish: ${meta.finish}; answer: ${meta.answer ?? "none"}${rightness}`;
get("prompt").textContent = meta.prompt;

// ---- events

for (const name of Object.keys(modes)) {
  const label = make("label"), radio = make("input");
  Object.assign(radio, { type: "radio", name: "mode", value: name, checked: name === mode });
  radio.disabled = name === "soft weight" && columns.weight.every((weight) => weight > 0.9999);
  radio.addEventListener("change", () => { mode = name; paint(); });
  label.append(radio, " " + name + (radio.disabled ? " (no soft step)" : ""));
  get("modes").append(label);
}

function lineAbove(direction) {  // the token above or below: on the next line, nearest to this one's middle
  const boxes = spans.map((span) => span.getClientRects()[0] ?? span.getBoundingClientRect());
  const own = boxes[current], middle = (box) => box.left + box.width / 2;
  const beyond = boxes.map((box, i) => i).filter((i) => direction * (boxes[i].top - own.top) > 3);
  const nearest = Math.min(...beyond.map((i) => Math.abs(boxes[i].top - own.top)));
  const line = beyond.filter((i) => Math.abs(boxes[i].top - own.top) < nearest + 3);
  line.sort((a, b) => Math.abs(middle(boxes[a]) - middle(own)) - Math.abs(middle(boxes[b]) - middle(own)));
  return line.length ? line[0] : current;
}

const keys = {
  ArrowLeft: () => goTo(current - 1), ArrowRight: () => goTo(current + 1), Home: () => goTo(0), End: () => goTo(T - 1),
  ArrowUp: () => goTo(lineAbove(-1)), ArrowDown: () => goTo(lineAbove(1)),
  Enter: () => select(current, !pinned), " ": () => select(current, !pinned), Escape: () => select(current, false),
};
get("text").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
const stepOf = (event) => { const span = event.target.closest(".token"); return span && Number(span.dataset.step); };
get("text").addEventListener("mouseover", (event) => {
  if (!pinned && stepOf(event) !== null) select(stepOf(event));
});
get("text").addEventListener("click", (event) => {
  if (stepOf(event) !== null) select(stepOf(event), !(pinned && stepOf(event) === current));
});
strip.addEventListener("mousemove", (event) => { if (!pinned) goTo(stepAt(event)); });
strip.addEventListener("click", (event) => goTo(stepAt(event), true));
get("spaces").addEventListener("change", writeText);
get("search").addEventListener("input", search);
get("search").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !matches.length) return;
  goTo(matches.find((i) => i > current) ?? matches[0]);
});
get("theme").addEventListener("click", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  paint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
paint();
select(0);
</script>
</body>
</html>
"""
