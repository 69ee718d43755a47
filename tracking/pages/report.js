// Draws report.html from the data of make_report in tracking/report.py. The helpers of shared.js are above this script.

const data = block("data");

// ---- numbers and text

const shorten = (text, limit) => (text.length > limit ? text.slice(0, limit - 1) + "…" : text);
const percent = (x) => (100 * x).toFixed(1) + "%";
function short(x) {  // four digits; "–" for a number that is missing
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? x.toExponential(1) : String(Number(x.toPrecision(4)));
}
const ending = ({ finish, length }) => (length ?? null) === null ? "" : `${finish === "length" ? "cut off" : "stopped"} after ${length} tokens`;
const signed = (x) => (x > 0 ? "+" : "") + short(x);

// ---- the head

// Writes {name: value} as a line of facts into the element with that id.
function writeFacts(id, facts) {
  for (const [name, value] of Object.entries(facts))
    get(id).append(make("span", "", make("span", "soft", name + " "), make("b", "", value ?? "–")));
}

// A cell of the accuracy table. measure: [value, low, high], [value], or null.
function measureCell(measure) {
  const [value, low, high] = measure ?? [];
  if (value === undefined) return make("td", "", "–");
  const interval = low === undefined ? "" : ` [${percent(low)}, ${percent(high)}]`;
  return make("td", "", percent(value), make("small", "", interval));
}

const { headline } = data;
document.title = "Run " + data.name;
get("name").textContent = printed("Run " + data.name);
writeFacts("facts", headline.facts);
if (headline.measures.length) {
  const steps = headline.steps.map((step) => make("th", "", `after step ${step}`));
  get("measures").append(make("tr", "", make("th", "", "on the test split"), ...steps));
  for (const { name, cells } of headline.measures)
    get("measures").append(make("tr", "", make("th", "", name), ...cells.map(measureCell)));
  get("note").textContent = headline.note;
} else get("note").textContent = "No evaluation yet.";

// ---- health

for (const { level, name, message, rule, advice } of data.findings) {
  const title = make("h4", "", make("span", "badge", level), name);
  const card = make("div", "card finding " + level, title, make("p", "", message), make("p", "soft", `(${rule})`));
  if (level !== "ok") card.append(make("p", "", make("b", "", "Try: "), advice));
  get("findings").append(card);
}
if (!data.findings.length) get("findings").append(make("p", "soft", "Nothing has been logged yet."));

// ---- curves

// All lengths in units of the SVG's view box: its size, and the space around the plot area.
const WIDTH = 420, HEIGHT = 200, LEFT = 52, RIGHT = 16, TOP = 8, BOTTOM = 22;

// Round numbers between low and high, with at most `count` equal intervals between them.
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const gap = [1, 2, 5, 10].map((m) => m * power).find((g) => g >= raw);
  const found = [];
  for (let i = Math.ceil(low / gap); i * gap <= high + 1e-9 * gap; i++) found.push(i * gap);
  return found;
}

// Draws a band (or one bar) for the intervals, the values, dots if they are few, and the moving mean if there is one.
// x: function from a step, y: function from a value, to a coordinate in the picture.
function drawCurve(picture, curve, color, x, y) {
  const points = curve.steps.map((step, t) => [x(step), y(curve.values[t])]);
  const ends = curve.steps.flatMap((step, t) => {
    const interval = curve.intervals[t];
    return interval ? [[x(step), ...interval.map(y)]] : [];  // [x, y of the low end, y of the high end]
  });
  if (ends.length > 1) {
    const band = [...ends.map(([at, low]) => [at, low]), ...ends.map(([at, , high]) => [at, high]).reverse()];
    addShape(picture, "polygon", { points: band.join(" "), style: `fill: ${color}; opacity: .15` });
  }
  if (ends.length === 1) {
    const [at, low, high] = ends[0];
    addShape(picture, "line", { x1: at, x2: at, y1: low, y2: high, style: `stroke: ${color}; opacity: .5` });
  }
  const line = (where, width, opacity) => addShape(picture, "polyline",
    { points: where.join(" "), style: `fill: none; stroke: ${color}; stroke-width: ${width}; opacity: ${opacity}` });
  line(points, curve.mean ? 0.8 : 1.8, curve.mean ? 0.4 : 1);
  if (curve.mean) line(curve.steps.map((step, t) => [x(step), y(curve.mean[t])]), 2, 1);
  if (points.length <= 30)
    for (const [cx, cy] of points) addShape(picture, "circle", { cx, cy, r: 2.5, style: `fill: ${color}` });
}

// Returns an element that shows the values of one step: the one nearest to the pointer or chosen with the arrow keys;
// the last step while the picture has neither pointer nor focus.
function addReadout(picture, steps, curves, write, x) {
  const cursor = addShape(picture, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const readout = make("div", "readout");
  let current = steps.length - 1;
  function read(i) {
    current = Math.min(Math.max(i, 0), steps.length - 1);
    const step = steps[current];
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
    cursor.setAttribute("visibility", "visible");
    const values = curves.flatMap((curve) => {
      const t = curve.steps.indexOf(step);
      if (t < 0) return [];
      const interval = curve.intervals[t] ? ` [${curve.intervals[t].map(write).join(", ")}]` : "";
      return [`${curve.key} ${write(curve.values[t])}${interval}`];
    });
    readout.textContent = `step ${step}: ${values.join(", ")}`;
  }
  function reset() {
    read(steps.length - 1);
    cursor.setAttribute("visibility", "hidden");
  }
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * WIDTH;
    const distances = steps.map((step) => Math.abs(x(step) - at));
    read(distances.indexOf(Math.min(...distances)));
  });
  picture.addEventListener("pointerleave", reset);
  picture.addEventListener("focus", () => read(current));
  picture.addEventListener("blur", reset);
  picture.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    read(moves[event.key]);
  });
  reset();
  return readout;
}

// One chart: title, unit, picture, readout, and a legend with the explanation of each metric.
function chartCard({ title, unit, percent: isShare, curves }) {
  const write = isShare ? percent : short;
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const first = steps[0], last = steps.at(-1);
  const all = curves.flatMap((curve) => [...curve.values, ...curve.intervals.flatMap((i) => i ?? [])]);
  const low = Math.min(0, ...all), top = Math.max(...all), high = top > low ? top + 0.04 * (top - low) : low + 1;
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low));
  const picture = addShape(document.createElement("div"), "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img" });
  picture.setAttribute("aria-label", `${title}, steps ${first} to ${last}; arrow keys read values`);
  for (const tick of ticks(low, high, 6)) {
    addShape(picture, "line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) });
    const name = isShare ? short(100 * tick) + "%" : short(tick);
    addShape(picture, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, name);
  }
  for (const tick of last > first ? ticks(first, last, 5).filter(Number.isInteger) : [first])
    addShape(picture, "text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, tick);
  const legend = make("ul", "legend");
  curves.forEach((curve, i) => {
    const color = `var(--c${i % 4})`, swatch = make("span", "swatch");
    drawCurve(picture, curve, color, x, y);
    swatch.style.background = color;
    legend.append(make("li", "", swatch, make("code", "", curve.key), " " + curve.what.replaceAll("`", "")));
  });
  const readout = addReadout(picture, steps, curves, write, x);
  return make("div", "card chart", make("h4", "", title), make("div", "soft", unit), picture, readout, legend);
}

for (const { heading, panels } of data.sections)
  get("charts").append(make("h3", "", heading), make("div", "grid", ...panels.map(chartCard)));
if (!data.sections.length) get("charts").append(make("p", "soft", "Nothing has been logged yet."));

// ---- groups of answers: the document holds only the group that is shown

// How to shade tokens. level: how far token t of an answer stands out, from -1 to 1; key: what the colours mean.
const shades = {
  "log-prob": {
    level: (answer, t) => -(answer.logprobs[t] ?? 0) / 4,
    key: "strongest: p of 0.02 or less when it was sampled",
  },
  entropy: { level: (answer, t) => (answer.entropy[t] ?? 0) / 2, key: "strongest: 2 nats or more when it was sampled" },
  ratio: {
    level: (answer, t) => Math.log(answer.ratio[t] ?? 1) / Math.log(1.5),
    key: "p after the step's updates / p when sampled; blue: likelier, orange: less likely, strongest by half or more",
  },
  nothing: { level: () => 0, key: "" },
};
for (const name of Object.keys(shades)) get("shade").append(make("option", "", name));

let groups = [];  // of the step that is shown

// Sets the two variables from which report.css mixes a colour. level: from -1 (orange) to 1 (blue).
function setColor(element, level) {
  element.style.setProperty("--hue", level < 0 ? "var(--bad)" : "var(--good)");
  element.style.setProperty("--strength", 50 * Math.min(1, Math.abs(level)) + "%");
}

// Shows the step that the slider is at, and keeps the position in the list of problems.
function showStep() {
  const step = data.sample_steps[get("step").value];
  get("step-name").textContent = step;
  get("step").setAttribute("aria-valuetext", "step " + step);
  groups = block("step" + step);
  const before = get("problem").selectedIndex;
  get("problem").replaceChildren(...groups.map(({ prompt, answers }, i) => {
    const mean = answers.reduce((sum, answer) => sum + (answer.reward ?? 0), 0) / answers.length;
    const detail = answers.some((answer) => answer.tokens) ? ", with tokens" : "";
    const question = prompt.replace(/<\|.*?\|>(user|system|assistant)?/g, " ").replace(/\s+/g, " ").trim();
    const name = `${i + 1} of ${groups.length} (mean reward ${short(mean)}${detail}): ${shorten(question, 90)}`;
    return make("option", "", name);
  }));
  get("problem").selectedIndex = Math.min(Math.max(before, 0), groups.length - 1);
  showGroup();
}

function showGroup() {
  const group = groups[get("problem").selectedIndex];
  get("prompt").textContent = printed(group.prompt);
  get("gold").textContent = printed(`(right answer: ${group.gold ?? "unknown"})`);
  get("shade-label").hidden = !group.answers.some((answer) => answer.tokens);
  get("token").hidden = get("shade-label").hidden;
  const largest = Math.max(...group.answers.map((answer) => Math.abs(answer.advantage ?? 0)), 1e-9);
  get("answers").replaceChildren(...group.answers.map((answer, i) => answerCard(answer, i, largest)));
  shadeTokens();
}

// largest: the largest absolute advantage of the group; it gets the strongest colour.
function answerCard(answer, i, largest) {
  const advantage = make("span", "advantage", "advantage " + signed(answer.advantage));
  const parts = Object.entries(answer.parts).map(([name, value]) => `${name} ${short(value)}`);
  const scores = make("div", "scores", make("b", "", `answer ${i + 1}`), advantage,
    make("span", "", "reward " + short(answer.reward)),
    ...[...parts, ending(answer)].map((text) => make("span", "soft", text)));
  const text = answer.tokens ? tokenText(answer) : make("div", "text", answer.text || "(empty)");
  const card = make("article", "card answer", scores, text);
  setColor(card, ((answer.advantage ?? 0) / largest) * 2.5);
  return card;
}

// An answer token by token. Hovering or the arrow keys show the values of a token; `paint` shades all of them.
function tokenText(answer) {
  const spans = answer.tokens.map((token) => make("span", "token", token));
  const box = make("div", "text tokens", ...spans);
  box.tabIndex = 0;
  box.setAttribute("aria-label", "Tokens of an answer; arrow keys read values");
  spans.forEach((span, t) => { span.index = t; });
  box.paint = () => spans.forEach((span, t) => setColor(span, shades[get("shade").value].level(answer, t)));
  let current = 0;
  function read(t) {
    for (const other of document.querySelectorAll(".token.current")) other.classList.remove("current");
    current = Math.min(Math.max(t, 0), spans.length - 1);
    spans[current].classList.add("current");
    const logprob = answer.logprobs[current], name = JSON.stringify(answer.tokens[current]);
    const sampled = logprob === null ? "no draw of the policy" :
      `log-prob ${short(logprob)} (p = ${short(Math.exp(logprob))})`;
    get("token").textContent = printed(`token ${current + 1} of ${spans.length}, ${name}: ${sampled}, ` +
      `entropy ${short(answer.entropy[current])} nats, ratio ${short(answer.ratio[current])}`);
  }
  box.addEventListener("pointerover", (event) => { if (event.target.index !== undefined) read(event.target.index); });
  if (spans.length) box.addEventListener("focus", () => read(current));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !spans.length) return;
    event.preventDefault();
    read(current + move);
  });
  return box;
}

function shadeTokens() {
  for (const box of document.querySelectorAll(".tokens")) box.paint();
  get("token").textContent = shades[get("shade").value].key;
}

get("samples-note").textContent = data.samples_note;
if (data.sample_steps.length) {
  get("step").max = data.sample_steps.length - 1;
  get("step").addEventListener("input", showStep);
  get("problem").addEventListener("change", showGroup);
  get("shade").addEventListener("change", shadeTokens);
  showStep();
} else get("viewer").hidden = true;

// ---- games: the boards of one game, side by side

function showGameStep() {
  const before = get("game").selectedIndex;
  const { games } = data.games[get("game-step").selectedIndex];
  get("game").replaceChildren(...games.map(({ title }) => make("option", "", title)));
  get("game").selectedIndex = Math.min(Math.max(before, 0), games.length - 1);
  showGame();
}

function showGame() {
  const { start, plies } = data.games[get("game-step").selectedIndex].games[get("game").selectedIndex];
  const largest = Math.max(...plies.map((ply) => Math.abs(ply.advantage ?? 0)), 1e-9);
  const first = make("div", "card", make("div", "scores", make("b", "", "start")), make("pre", "", start));
  get("boards").replaceChildren(first, ...plies.map((ply, i) => {
    const advantage = make("span", "advantage", "advantage " + signed(ply.advantage));
    const head = make("div", "scores", make("b", "", `${i + 1}. seat ${ply.seat}: ${ply.move || "(empty)"}`),
      make("span", "soft", ply.player), ...(ply.player === "policy" ? [advantage] : []));
    const card = make("div", "card answer", head, make("pre", "", ply.after));
    setColor(card, ply.player === "policy" ? ((ply.advantage ?? 0) / largest) * 2.5 : 0);
    return card;
  }));
}

const hasGames = data.games.length > 0;  // then there are no groups of answers to one problem
for (const [kind, hidden] of [["game", !hasGames], ["sample", hasGames]]) {
  get(`${kind}-section`).hidden = hidden;
  document.querySelector(`nav a[href="#${kind}s"]`).hidden = hidden;
}
if (hasGames) {
  get("game-step").replaceChildren(...data.games.map(({ step }) => make("option", "", step)));
  get("game-step").addEventListener("change", showGameStep);
  get("game").addEventListener("change", showGame);
  get("game-step").selectedIndex = data.games.length - 1;
  showGameStep();
}

// ---- test problems before and after training

const { steps: testSteps, pairs } = data.evaluations;

function testCard(answer, step) {
  const head = make("b", "", `after step ${step} `);
  if (!answer) return make("div", "card", head, "not asked");
  const badge = make("span", "badge" + (answer.correct ? "" : " wrong"), answer.correct ? "✓ right" : "✗ wrong");
  const scores = make("div", "scores", head, badge, make("span", "soft", ending(answer)));
  return make("div", "card", scores, make("div", "text", answer.text || "(empty)"));
}

get("pairs-note").textContent = !pairs.length ? "No evaluation yet." : testSteps.length === 1
  ? `So far there is one evaluation, after step ${testSteps[0]}.` : "Sampled at the training temperature.";
for (const { question, gold, answers } of pairs) {
  const title = make("h3", "", make("span", "question", question), ` (right answer: ${gold})`);
  get("tests").append(title, make("div", "grid", ...answers.map((answer, i) => testCard(answer, testSteps[i]))));
}

// ---- configuration

// Fills the table with that id: with settings that differ from their defaults, or with the others.
function writeConfig(id, rows) {
  const names = id === "changed" ? ["setting", "value", "default", "set by", ""] : ["setting", "value", ""];
  get(id).append(make("tr", "", ...names.map((name) => make("th", "", name))));
  for (const { name, value, default: before, origin, what } of rows) {
    const cells = [make("td", "value", name), make("td", "value", JSON.stringify(value))];
    if (id === "changed") cells.push(make("td", "value", JSON.stringify(before)), make("td", "origin", origin));
    get(id).append(make("tr", "", ...cells, make("td", "soft", what)));
  }
}

writeFacts("made-with", data.made_with);
writeConfig("changed", data.config.filter((row) => row.origin !== "default"));
writeConfig("unchanged", data.config.filter((row) => row.origin === "default"));
