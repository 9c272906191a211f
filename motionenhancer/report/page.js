"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { view: null, row: null, frame: 0, playing: false, hidden: false };
const sources = Object.keys(data.names);
const STATES = {
  kept: ["kept", data.run ? "the student follows the teacher's map of the word" : "the prior holds its map"],
  missing: ["not found", "the teacher keeps the word, but it is not among the student's tokens"],
  dropped: ["dropped", "the word's motion score is lower than those of the kept words"],
  cut: ["cut", "the text was too long for the teacher, and the word comes after the cut"],
};

const CURVES = {
  loss_ar: "Loss of the answers",
  loss_align: "Distance to the teacher's maps",
  lambda: "λ, the weight of that distance",
  learning_rate: "Learning rate",
  words_mapped: "Share of the teacher's words that are found",
  confidence: "Confidence of the priors",
  grad_norm: "Norm of the gradient",
};

// Texts come from data files: they only ever become text nodes.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "polyline", "text", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : value.toFixed(digits);
}

// ---- what is known of a sample ----

function score(view, when, name) {
  const value = (view.scores[when] || {})[name];
  return value === undefined ? null : value;
}

function change(view, name = "loss_ar") {
  const [before, after] = [score(view, "before", name), score(view, "after", name)];
  return before === null || after === null ? null : after - before;
}

function direction(difference) {
  if (difference === null || Math.abs(difference) < 5e-4) return "";
  return difference > 0 ? "worse" : "better";
}

function sure(view) {
  return view.confidence ? view.confidence.confidence : null;
}

// ---- the list, its filters and its order ----

function passes(view) {
  const right = (when) => ({ true: "right", false: "wrong" })[score(view, when, "right")];
  return (
    (!$("task").value || view.task === $("task").value) &&
    (!$("change").value || direction(change(view)) === $("change").value) &&
    ["before", "after"].every((when) => !$(when).value || right(when) === $(when).value) &&
    (sure(view) ?? 1) >= Number($("confidence").value)
  );
}

const last = Number.MAX_VALUE;
const ORDERS = {
  order: () => 0,
  worst: (a, b) => (change(b) ?? -last) - (change(a) ?? -last),
  best: (a, b) => (change(a) ?? last) - (change(b) ?? last),
  confidence: (a, b) => (sure(b) ?? -1) - (sure(a) ?? -1),
  task: (a, b) => (a.task < b.task ? -1 : a.task > b.task ? 1 : 0),
};

function listed() {
  return data.views.filter(passes).sort(ORDERS[$("sort").value]);
}

function list() {
  const shown = listed();
  $("floor").textContent = Number($("confidence").value).toFixed(2);
  $("count").textContent = `${shown.length} of ${data.views.length}`;
  $("samples").replaceChildren(...shown.map((view) => make("li", {}, entry(view))));
}

function entry(view) {
  const mark = { true: "right", false: "wrong" };
  const lines = [];
  const about = [view.task && `task ${view.task}`, sure(view) !== null && `confidence ${number(sure(view), 2)}`];
  lines.push(make("span", {}, about.filter(Boolean).join(" · ")));
  const answers = ["before", "after"].map((when) => mark[score(view, when, "right")]).filter(Boolean);
  if (answers.length) lines.push(make("span", {}, `answer ${answers.join(" → ")}`));
  const difference = change(view);
  if (difference !== null) {
    const way = direction(difference);
    const word = way ? `${way} by ${number(Math.abs(difference))}` : "unchanged";
    lines.push(make("span", {}, "loss ", make("span", { class: way, style: "display:inline" }, word)));
  }
  const choose = () => show(view);
  return make("button", { type: "button", "aria-current": view === state.view, onclick: choose }, make("b", {}, view.id), ...lines);
}

// ---- one sample ----

async function show(view) {
  state.view = view;
  state.frame = view.times.length >> 1;
  list();
  const rows = view.words.filter((word) => hasMap(view, word));
  const best = rows.reduce((top, word) => (top && (top.score ?? 0) >= (word.score ?? 0) ? top : word), null);
  state.row = best ? best.row : null;
  $("name").textContent = view.task ? `${view.id} (task ${view.task})` : view.id;
  drawWords();
  drawFigures();
  drawHeads();
  $("time").max = Math.max(0, view.times.length - 1);
  $("maps").style.gridTemplateColumns = `repeat(${Object.keys(view.maps.sources).length || 1}, minmax(0, 1fr))`;
  $("maps").replaceChildren(
    ...sources.map((name) =>
      make("figure", { id: `figure-${name}`, hidden: view.maps.sources[name] ? null : "" },
        make("canvas", { id: `map-${name}`, ...canvasSize(view) }), make("figcaption", {}, data.names[name]))),
  );
  await Promise.all([loadFrames(view), ...Object.values(view.maps.sources).map(unpack)]);
  if (state.view === view) draw();
}

function hasMap(view, word) {
  return word.row !== undefined && word.row !== null && view.maps.peaks[word.row] !== undefined;
}

function canvasSize(view) {
  const factor = Math.max(1, 420 / view.size[0]);
  return { width: Math.round(view.size[0] * factor), height: Math.round(view.size[1] * factor) };
}

async function loadFrames(view) {
  if (view.pictures) return;
  view.pictures = await Promise.all(
    view.frames.map(async (text) => {
      const picture = new Image();
      picture.src = `data:image/jpeg;base64,${text}`;
      await picture.decode();
      return picture;
    }),
  );
}

async function unpack(source) {
  if (source.bytes) return;
  const packed = Uint8Array.from(atob(source.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  source.bytes = new Uint8Array(await new Response(stream).arrayBuffer());
}

function drawWords() {
  const view = state.view;
  const counts = {};
  const pieces = view.words.map((word) => {
    if (STATES[word.state]) counts[word.state] = (counts[word.state] || 0) + 1;
    const known = hasMap(view, word);
    if (!known && !STATES[word.state]) return word.text;
    const why = (STATES[word.state] || ["", "choose to see its maps"])[1];
    const options = { class: `word ${word.state}`, title: why + motion(word) };
    if (!known) return make("span", options, word.text);
    const choose = () => chooseWord(word.row);
    return make("button", { ...options, type: "button", "data-row": word.row, onclick: choose }, word.text);
  });
  $("words").replaceChildren(...pieces);
  $("legend").replaceChildren(
    ...Object.entries(STATES).filter(([name]) => counts[name]).map(([name, [label, why]]) =>
      make("p", {}, make("span", { class: `word ${name}` }, label), ` ${counts[name]}: ${why}${scoresOf(name)}.`)));
  markWord();
}

function motion(word) {
  return word.score === undefined ? "" : `. Motion score ${number(word.score, 4)}`;
}

function scoresOf(name) {
  const scores = state.view.words.filter((word) => word.state === name && word.score !== undefined).map((word) => word.score);
  return scores.length ? ` (scores ${number(Math.min(...scores), 4)} to ${number(Math.max(...scores), 4)})` : "";
}

function chooseWord(row) {
  state.row = row;
  markWord();
  draw();
}

function markWord() {
  const view = state.view;
  for (const button of $("words").querySelectorAll("button")) {
    const pressed = Number(button.dataset.row) === state.row;
    button.setAttribute("aria-pressed", pressed);
    // A long text scrolls in its box, so that the maps stay near.
    const box = $("words");
    const below = button.offsetTop - box.offsetTop - box.scrollTop;
    if (pressed && (below < 0 || below + button.offsetHeight > box.clientHeight)) box.scrollTop += below;
  }
  const word = view.words.find((one) => one.row === state.row && hasMap(view, one));
  const kept = STATES[word && word.state];
  $("about").textContent = word
    ? `“${word.text}”` + (kept ? ` is ${kept[0]}: ${kept[1]}` : "") + motion(word) +
      (word.score === undefined ? "." : ": the attention to the clip, plus its change over time.") +
      (view.timed === false ? " The prior holds no times: its frames are spread evenly over the clip." : "")
    : "No word of this sample has a map.";
}

// ---- maps over the clip ----

function draw() {
  const view = state.view;
  const time = view.times[state.frame] ?? 0;
  $("time").value = state.frame;
  $("clock").textContent = `${time.toFixed(2)} s of ${view.duration.toFixed(2)} s`;
  $("time").setAttribute("aria-valuetext", `${time.toFixed(2)} seconds`);
  const top = (view.maps.tops[state.row] || 1) * 2 ** -Number($("contrast").value);
  $("top").textContent = `${number(top, 1)} × the map's mean`;
  drawRamp();
  for (const [name, source] of Object.entries(view.maps.sources)) {
    const canvas = $(`map-${name}`);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingEnabled = true;
    context.clearRect(0, 0, canvas.width, canvas.height);
    const picture = view.pictures && view.pictures[state.frame];
    if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const at = source.rows.indexOf(state.row);
    canvas.parentNode.lastChild.textContent = data.names[name] + (at < 0 ? ": no map of this word" : "");
    if (at < 0 || state.hidden || !source.bytes) continue;
    const smooth = $("smooth").checked;
    const values = densities(name, source, at, view.maps.peaks[state.row]);
    const layer = paint(source, values, time, top, smooth);
    context.globalAlpha = Number($("opacity").value);
    context.imageSmoothingEnabled = smooth;
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
  }
}

// A word's map as it was read. If the switch is on, the teacher's map is sharpened as in the run.
function densities(name, source, at, peak) {
  const size = source.grid[0] * source.grid[1] * source.grid[2];
  const read = Array.from(source.bytes.subarray(at * size, (at + 1) * size), (step) => (step / 255) ** 2 * peak);
  if (name !== "teacher" || !$("sharpen").checked) return read;
  const sharp = read.map((value) => (value / peak) ** (1 / data.run.temperature));
  const mean = sharp.reduce((sum, value) => sum + value, 0) / size;
  return sharp.map((value) => value / (mean || 1));
}

// Densities of the grid's cells at a time: of the nearest frame, or between the two around it.
function cells(source, values, time, smooth) {
  const [frames, height, width] = source.grid;
  const size = height * width;
  const read = (frame, cell) => values[frame * size + cell];
  let next = source.times.findIndex((one) => one >= time);
  if (next < 0) next = frames - 1;
  const before = Math.max(0, next - 1);
  const gap = source.times[next] - source.times[before];
  let share = gap > 0 ? Math.min(1, (time - source.times[before]) / gap) : 1;
  if (!smooth) share = share > 0.5 ? 1 : 0;
  return Array.from({ length: size }, (_, cell) => (1 - share) * read(before, cell) + share * read(next, cell));
}

function paint(source, values, time, top, smooth) {
  const [, height, width] = source.grid;
  const layer = make("canvas", { width, height });
  const picture = new ImageData(width, height);
  cells(source, values, time, smooth).forEach((value, cell) => {
    // Little attention is also drawn thinly, so that the clip is seen through it.
    const share = Math.min(1, value / top);
    picture.data.set([...colour(share), 255 * (0.25 + 0.75 * share)], 4 * cell);
  });
  layer.getContext("2d").putImageData(picture, 0, 0);
  return layer;
}

function colour(value) {
  const table = data.colours[$("colours").value].split(" ");
  const place = value * (table.length - 1);
  const low = Math.min(table.length - 2, Math.floor(place));
  const channel = (entry, at) => parseInt(entry.slice(2 * at, 2 * at + 2), 16);
  return [0, 1, 2].map((at) => channel(table[low], at) + (place - low) * (channel(table[low + 1], at) - channel(table[low], at)));
}

function drawRamp() {
  const picture = new ImageData(128, 1);
  for (let i = 0; i < 128; i++) picture.data.set([...colour(i / 127), 255], 4 * i);
  $("ramp").getContext("2d").putImageData(picture, 0, 0);
}

// ---- time ----

let timer = 0;
function play(on) {
  state.playing = on && state.view.times.length > 1;
  $("play").textContent = state.playing ? "Stop" : "Play";
  clearTimeout(timer);
  if (state.playing) tick();
}

function tick() {
  const times = state.view.times;
  const next = (state.frame + 1) % times.length;
  const wait = next ? times[next] - times[state.frame] : 0.5;
  timer = setTimeout(() => {
    step(next - state.frame);
    tick();
  }, 1000 * Math.min(2, Math.max(0.02, wait)));
}

function step(by) {
  state.frame = Math.min(Math.max(0, state.frame + by), Math.max(0, state.view.times.length - 1));
  draw();
}

// ---- figures ----

function table(head, rows) {
  const cell = (tag) => (value) => make(tag, { class: /^[-+–\d]/.test(value.textContent ?? value) ? "number" : null }, value);
  return make("table", {},
    make("thead", {}, make("tr", {}, ...head.map(cell("th")))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell("td"))))));
}

function drawFigures() {
  const view = state.view;
  const rows = [];
  for (const [name, label] of [["loss_ar", "loss of the answer"], ["loss_align", "distance to the teacher's maps"]]) {
    const difference = change(view, name);
    if (score(view, "before", name) === null && score(view, "after", name) === null) continue;
    const sign = difference > 0 ? "+" : "";
    const text = difference === null ? "–" : sign + number(difference, 4);
    rows.push([label, number(score(view, "before", name), 4), number(score(view, "after", name), 4),
      make("span", { class: direction(difference) }, `${text} ${direction(difference)}`)]);
  }
  const said = ["before", "after"].map((when) => score(view, when, "said"));
  if (said.some((text) => text !== null)) {
    const right = ["before", "after"].map((when) => ({ true: " (right)", false: " (wrong)" })[score(view, when, "right")] || "");
    rows.push(["answer*", (said[0] ?? "–") + right[0], (said[1] ?? "–") + right[1], ""]);
  }
  const parts = [];
  if (view.answer) parts.push(make("p", {}, "Right answer: ", make("b", {}, view.answer)));
  if (rows.length) parts.push(table(["", "before training", "after training", "change"], rows));
  if (said.some((text) => text !== null)) parts.push(make("p", { class: "note" }, "* Each word is predicted from the right words before it."));
  if (view.confidence) {
    const about = view.confidence;
    parts.push(make("p", {}, `Confidence of the teacher's maps: ${number(about.confidence)}, from 0 to 1. It is high if ` +
      `the maps are concentrated on few places (${number(about.concentration)}) and vary over time (${number(about.variation)}).`));
  }
  $("figures").replaceChildren(...parts);
}

function bars(label, values, chosen) {
  const finite = values.filter((value) => value !== null);
  const [low, high] = [Math.min(0, ...finite), Math.max(0, ...finite)];
  const at = (value) => 78 - (68 * (value - low)) / (high - low || 1);
  const width = 300 / values.length;
  const rects = values.map((given, head) => {
    const value = given === null ? high : given;
    const [top, bottom] = [Math.min(at(value), at(0)), Math.max(at(value), at(0))];
    const kept = chosen.has(head);
    return make("rect", { class: kept ? "bar chosen" : "bar", "data-head": head, x: 36 + head * width + 0.1 * width, y: top,
      width: 0.8 * width, height: Math.max(0.5, bottom - top) },
      make("title", {}, `head ${head}: ${given === null ? "infinite" : number(given)}, ${kept ? "kept" : "not kept"}`));
  });
  return make("div", {}, make("h3", {}, label),
    make("svg", { viewBox: "0 0 340 96", role: "img", "aria-label": `${label} of ${values.length} heads` },
      make("line", { class: "axis", x1: 36, x2: 336, y1: at(0), y2: at(0) }), ...rects,
      make("text", { x: 0, y: 14 }, number(high, 2)), make("text", { x: 0, y: 80 }, number(low, 2)),
      make("text", { x: 36, y: 94 }, "head 0"), make("text", { x: 336, y: 94, "text-anchor": "end" }, values.length - 1)));
}

function drawHeads() {
  const heads = state.view.heads;
  if (!heads) return $("heads").replaceChildren();
  const chosen = new Set(heads.chosen);
  const total = heads.scores.composite.length;
  const why = heads.selection === "off"
    ? "No heads were selected: the map is the mean over all."
    : `${chosen.size} of ${total} heads are kept (dark bars: ${heads.chosen.join(", ")}): those with the highest sum of ` +
      `the three scores, each standardised over the heads (--head_ratio ${heads.ratio}).`;
  const labels = { composite: "Sum of the standardised scores", dfc: "DFC: squares of attention along time, over all other squares",
    tcs: "TCS: mean run of frames above the map's mean", dsr: "DSR: share of attention along time above the mean" };
  $("heads").replaceChildren(make("h2", {}, "The teacher's heads"),
    make("p", {}, `The teacher's maps were read ${state.view.reading}. ${why}`),
    make("div", { id: "bars" }, ...Object.entries(labels).map(([name, label]) => bars(label, heads.scores[name], chosen))));
}

function curve(name, points) {
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1]).filter((y) => y !== null)];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = (value) => 46 + (250 * (value - left)) / (right - left || 1);
  const y = (value) => 84 - (74 * (value - low)) / (high - low || 1);
  const path = points.filter((p) => p[1] !== null).map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
  return make("div", {}, make("h3", {}, CURVES[name]),
    make("div", { class: "note" }, `${name}: ${number(ys[0], 4)} → ${number(ys[ys.length - 1], 4)}`),
    make("svg", { viewBox: "0 0 300 104", role: "img", "aria-label": `${CURVES[name]} over steps` },
      make("line", { class: "axis", x1: 46, x2: 296, y1: 86, y2: 86 }), make("polyline", { class: "curve", points: path.join(" ") }),
      make("text", { x: 0, y: 14 }, number(high)), make("text", { x: 0, y: 84 }, number(low)),
      make("text", { x: 46, y: 100 }, `step ${left}`), make("text", { x: 296, y: 100, "text-anchor": "end" }, right)));
}

function drawRun() {
  const run = data.run;
  const before = data.views.filter((view) => score(view, "before", "right") === true).length;
  const after = data.views.filter((view) => score(view, "after", "right") === true).length;
  const ways = data.views.map((view) => direction(change(view)));
  const some = data.views.some((view) => change(view) !== null);
  $("summary").textContent = some
    ? `${data.views.length} samples, read before and after training. Loss of the answer: better for ` +
      `${ways.filter((way) => way === "better").length}, worse for ${ways.filter((way) => way === "worse").length}. ` +
      `Right answers: ${before} before, ${after} after.`
    : `${data.views.length} clip${data.views.length === 1 ? "" : "s"}.`;
  if (!run) return;
  $("facts").replaceChildren(...run.facts.map(([name, value]) => make("li", {}, make("b", {}, name), ` ${value}`)));
  const parts = [];
  const curves = Object.entries(run.curves).filter(([, points]) => points.some((p) => p[1] !== null));
  if (curves.length) {
    parts.push(make("h2", {}, "The run's curves"), make("div", { id: "curves" }, ...curves.map(([name, points]) => curve(name, points))));
  }
  if (run.evaluation) {
    const tasks = Object.keys(Object.values(run.evaluation)[0].tasks);
    parts.push(make("h2", {}, "Accuracy on the test questions, in percent"), table(["", "overall", ...tasks],
      Object.entries(run.evaluation).map(([when, one]) => [when, number(one.overall, 1), ...tasks.map((task) => number(one.tasks[task], 1))])));
  }
  parts.push(make("details", { id: "settings" }, make("summary", {}, "All settings of the run"),
    make("table", {}, ...run.settings.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, value))))));
  $("run").replaceChildren(...parts);
}

// ---- keys and controls ----

function neighbour(items, current, by) {
  const at = items.indexOf(current);
  return items[at < 0 ? 0 : Math.min(Math.max(0, at + by), items.length - 1)];
}

document.addEventListener("keydown", (event) => {
  if (!state.view || event.ctrlKey || event.metaKey || event.altKey) return;
  const focus = document.activeElement;
  if (["SELECT", "INPUT"].includes(focus.tagName) && focus.type !== "checkbox") return;
  if (event.key === " " && ["BUTTON", "SUMMARY", "INPUT"].includes(focus.tagName)) return;
  const word = (by) => {
    const buttons = [...$("words").querySelectorAll("button")];
    const next = neighbour(buttons, buttons.find((one) => one.getAttribute("aria-pressed") === "true"), by);
    if (next) next.click();
  };
  const sample = (by) => {
    const next = neighbour(listed(), state.view, by);
    if (next) show(next);
  };
  const actions = {
    " ": () => play(!state.playing),
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ArrowUp: () => sample(-1),
    ArrowDown: () => sample(1),
    p: () => word(-1),
    n: () => word(1),
    s: () => $("smooth").click(),
    o: () => { state.hidden = !state.hidden; draw(); },
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

document.title = data.title;
$("title").textContent = data.title;
$("colours").append(...Object.keys(data.colours).map((name) => make("option", {}, name)));
const tasks = [...new Set(data.views.map((view) => view.task).filter(Boolean))].sort();
$("task").append(...tasks.map((task) => make("option", { value: task }, task)));
if (!data.views.some((view) => change(view) !== null)) document.querySelectorAll(".student").forEach((one) => (one.hidden = true));
for (const id of ["sort", "task", "change", "before", "after", "confidence"]) $(id).addEventListener("input", list);
$("followed").hidden = !data.run || data.run.temperature === 1;
for (const id of ["smooth", "sharpen", "opacity", "contrast", "colours"]) $(id).addEventListener("input", draw);
$("time").addEventListener("input", () => step(Number($("time").value) - state.frame));
$("play").addEventListener("click", () => play(!state.playing));
drawRun();
list();
$("layout").classList.toggle("single", data.views.length < 2);
if (data.views.length) show(data.views[0]);
else $("viewer").replaceChildren(make("p", {}, "The run kept no samples: train with --report_samples above 0."));
