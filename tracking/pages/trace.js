// Draws trace.html from the data of page_data in analysis/page.py. The helpers of shared.js are above this script.

const { meta, columns, scales } = block("data");
const T = columns.text.length;  // steps; every column has one entry per step

// Text with white space as symbols.
const visible = (text) => printed(text).replaceAll(" ", "·").replaceAll("\t", "⇥").replaceAll("\n", "↵");
const short = (x) => (x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toFixed(3));
const percent = (x) => (100 * x).toFixed(0) + " %";

// ---- colour: each mode gives every step a level from 0 (the colour of the page) to 1

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

// The colour at a level of a scale, interpolated between its colours: [red, green, blue], 0 to 255.
function rgb(level, scale) {
  const position = Math.min(Math.max(level, 0), 1) * (scale.length - 1);
  const from = Math.min(Math.floor(position), scale.length - 2);
  const channel = (hex, c) => parseInt(hex.slice(1 + 2 * c, 3 + 2 * c), 16);
  const mix = (c) => {
    const [before, after] = [scale[from], scale[from + 1]].map((hex) => channel(hex, c));
    return before + (position - from) * (after - before);
  };
  return [0, 1, 2].map(mix);
}

function luminance(color) {  // relative luminance as WCAG defines it, 0 to 1
  const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function paint() {
  const scale = scales[isDark() ? "dark" : "light"];
  spans.forEach((span, i) => {
    const color = rgb(modes[mode].level(i), scale);
    span.style.backgroundColor = `rgb(${color.map(Math.round).join(" ")})`;
    span.style.color = luminance(color) > 0.179 ? "#000" : "#fff";  // whichever has more contrast
  });
  get("gradient").style.background = `linear-gradient(to right, ${scale.join(", ")})`;
  get("low").textContent = modes[mode].low;
  get("high").textContent = modes[mode].high;
}

// ---- the text

const spans = columns.text.map((text, i) => {
  const span = make("span", "token" + (columns.fork[i] ? " fork" : ""), text);
  span.id = "token" + i;
  span.dataset.step = i;
  span.setAttribute("role", "option");
  return span;
});
get("text").append(...spans);

function writeText() {
  const showSpaces = get("spaces").checked;
  spans.forEach((span, i) => {
    const text = columns.text[i];
    span.textContent = showSpaces ? visible(text).replaceAll("↵", "↵\n") : printed(text);
  });
}

// ---- the current token: its outline, the mark in the strip, the panel at the side

let current = 0, pinned = false;

// Makes token i the current one. A pinned token stays current while the pointer moves over others.
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

function describe(i) {  // fills the panel at the side
  const kind = [columns.part[i], columns.fork[i] && "fork", columns.forced[i] && "forced"].filter(Boolean).join(", ");
  get("name").textContent = visible(columns.text[i]) || "(nothing)";
  get("kind").textContent =
    `step ${i} of ${T}${kind && ", " + kind}; id ${columns.id[i]}, bytes ${columns.bytes[i] || "none"}`;
  const numbers = {
    p: short(Math.exp(columns.logp[i])), "ln p": columns.logp[i].toFixed(3), rank: columns.rank[i],
    "H (nats)": columns.entropy[i].toFixed(3), "H (bits)": (columns.entropy[i] / Math.LN2).toFixed(3),
    varentropy: columns.varentropy[i].toFixed(3), n95: columns.n95[i], "top weight": columns.weight[i].toFixed(2),
  };
  get("numbers").replaceChildren(...Object.entries(numbers).map(
    ([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))));
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

// A row of the table of likeliest tokens. sum: of the probabilities up to this rank; null: unknown.
function topRow(rank, text, logp, sum, isChosen) {
  const bar = make("div");
  bar.style.width = 100 * Math.exp(logp) + "%";
  return make("tr", isChosen ? "chosen" : "",
    make("td", "", rank), make("td", "name", visible(text) + (isChosen ? " ✓" : "")), make("td", "bar", bar),
    make("td", "", short(Math.exp(logp))), make("td", "", logp.toFixed(2)), make("td", "", sum ? sum.toFixed(3) : ""));
}

// ---- the entropy strip

const strip = get("strip");
strip.setAttribute("viewBox", `0 0 ${T} 100`);

columns.part.forEach((part, i) => {
  if (part) addShape(strip, "rect", { class: part, x: i, y: 0, width: 1.02, height: 100 });
});
const bars = (isFork) => columns.entropy.map((h, i) =>
  columns.fork[i] === isFork ? `M${i + 0.08} 100V${100 - (94 * h) / maxEntropy}H${i + 0.92}V100Z` : "").join("");
addShape(strip, "path", { class: "bars", d: bars(false) });
addShape(strip, "path", { class: "forks", d: bars(true) });
const here = addShape(strip, "rect", { class: "here", y: 0, width: 1, height: 100 });
const stepAt = (event) => Math.floor(((event.clientX - strip.getBoundingClientRect().left) / strip.clientWidth) * T);
get("highest").textContent = `entropy, 0 to ${maxEntropy.toFixed(2)} nats`;
get("parts").textContent = columns.part.some(Boolean) ? "tinted: reasoning (blue), answer (orange)" : "";
get("last").textContent = `step ${T - 1}`;

// ---- forks, search, facts

const forced = new Map(meta.forced_forks.map((fork) => [fork.step, fork]));
const forkSteps = columns.fork.flatMap((isFork, i) => (isFork ? [i] : []));
forkSteps.sort((a, b) => columns.entropy[b] - columns.entropy[a]);
for (const i of forkSteps) {
  const others = columns.top[i].filter(([, , id]) => id !== columns.id[i]).slice(0, 3).map(([text, logp]) =>
    make("span", "other", visible(text) + " ", make("small", "", short(Math.exp(logp)))));
  const resampled = forced.get(i);  // undefined if this fork was not resampled
  const changes = resampled &&
    `${percent(resampled.changed_with_runner_up)} (${percent(resampled.changed_with_token)})`;
  const button = make("button", "", i);
  button.type = "button";
  const row = make("tr", "", make("td", "", button), make("td", "name", visible(columns.text[i])),
    make("td", "", short(Math.exp(columns.logp[i]))), make("td", "", columns.entropy[i].toFixed(3)),
    make("td", "name", ...others), make("td", "", changes ?? ""));
  row.addEventListener("click", () => goTo(i, true));
  get("forks").tBodies[0].append(row);
}

let matches = [];  // the first token of each match
function search() {
  const query = get("search").value.toLowerCase();
  const ends = [];  // character offset after each token
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

function goTo(i, pin = pinned) {  // selects token i and scrolls to it
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

// The token above (direction -1) or below (1): on the next line, horizontally nearest to the current token.
function tokenOnNextLine(direction) {
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
  ArrowUp: () => goTo(tokenOnNextLine(-1)), ArrowDown: () => goTo(tokenOnNextLine(1)),
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
