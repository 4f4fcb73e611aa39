// The gallery of a report: filters, a viewer for single samples, and a 3D view that is drawn on request.
const byId = (id) => document.getElementById(id);
const { samples, heat, predicted, truth } = JSON.parse(byId("samples").textContent);
const cards = byId("cards");
const viewer = byId("viewer");
const plot = byId("plot");
const CAMERA = { eye: { x: 0.33, y: -1.15, z: 1.62 }, up: { x: 0, y: 1, z: 0 }, center: { x: 0, y: 0, z: 0 } };
const LIGHT = { diffuse: 0.5, specular: 0.1, roughness: 0.8, fresnel: 0.1 };
let shown = []; // numbers of the samples that pass the filters
let current = -1; // position of the viewer in `shown`
let space = { open: false, color: "image", drawing: 0 }; // of the 3D view; drawing counts the requests

// Elements

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function imageView(sample, source, alt, outlined) {
  const [width, height] = sample.size;
  const shot = element("span", { className: "shot" });
  shot.style.aspectRatio = `${width} / ${height}`;
  const layer = (src, text) => element("img", { src, alt: text, width, height, loading: "lazy", decoding: "async" });
  shot.append(layer(source, alt));
  if (outlined && sample.lines) shot.append(layer(sample.lines, ""));
  return shot;
}

const score = (value, digits = 4) => Number(value.toPrecision(digits)).toString();
const rounded = (number) => number.toFixed(2).replace(/^-0\.00$/, "0.00");
const severity = (sample) => (sample.severity === null ? `score ${score(sample.score)}` : `severity ${rounded(sample.severity)}`);

function outcome(sample) {
  const made = element("span", { className: "outcome", textContent: sample.outcome });
  made.dataset.outcome = sample.outcome;
  return made;
}

// Cards and filters

function card(sample, number) {
  const pair = element("span", { className: "pair" });
  if (sample.view) pair.append(imageView(sample, sample.view.image, sample.view.name, true));
  else pair.classList.add("alone");
  pair.append(imageView(sample, sample.maps.fused, "anomaly map", !sample.view));
  const button = element(
    "button",
    { type: "button" },
    pair,
    element("span", {}, outcome(sample), ` · ${severity(sample)}`),
    element("span", { className: "card-path", textContent: `${sample.class} · ${sample.path.replace(/^test\//, "")}` }),
  );
  button.addEventListener("click", () => open(shown.indexOf(number)));
  const item = element("li", {}, button);
  item.dataset.sample = number;
  return item;
}

const selects = [...document.querySelectorAll("[data-filter]")];

function filter() {
  shown = [];
  for (const item of cards.children) {
    const sample = samples[item.dataset.sample];
    const kept = selects.every((select) => !select.value || sample[select.dataset.filter] === select.value);
    item.hidden = !kept;
    if (kept) shown.push(Number(item.dataset.sample));
  }
  byId("count").textContent = shown.length ? `${shown.length} of ${samples.length} samples` : "No sample fits these filters.";
}

function walkCards(event) {
  const buttons = [...cards.querySelectorAll("li:not([hidden]) > button")];
  const at = buttons.indexOf(document.activeElement);
  if (at < 0) return;
  const top = buttons[0].offsetTop;
  const columns = Math.max(1, buttons.filter((button) => button.offsetTop === top).length);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  let target = at + steps[event.key];
  if (event.key === "Home") target = 0;
  if (event.key === "End") target = buttons.length - 1;
  if (!Number.isInteger(target)) return;
  event.preventDefault();
  if (buttons[target]) buttons[target].focus();
}

// A click on the dot of a shown sample opens the sample.
function openFromDots() {
  for (const dot of document.querySelectorAll(".dot")) {
    const name = dot.closest(".strip").dataset.class;
    const number = samples.findIndex((sample) => sample.class === name && sample.path === dot.dataset.path);
    if (number < 0) continue;
    dot.classList.add("opens");
    dot.addEventListener("click", () => {
      for (const select of selects) select.value = "";
      filter();
      open(shown.indexOf(number));
    });
  }
}

// Viewer

function panel(sample, title, source, outlined) {
  const caption = element("figcaption", {}, element("b", { textContent: title }));
  return element("figure", {}, caption, imageView(sample, source, title, outlined));
}

function facts(sample) {
  const banks = Object.entries(sample.scores).map(([name, value]) => `${name} ${score(value)}`);
  const truth = sample.label ? `${sample.defect}${sample.truth ? "" : ", not marked"}` : "good";
  const raw = sample.severity === null ? "" : ` · score ${score(sample.score)}`;
  return ` · ${severity(sample)} · ground truth: ${truth}${raw}` + (banks.length ? ` · scores of the memory banks: ${banks.join(", ")}` : "");
}

function show(position) {
  current = position;
  const sample = samples[shown[position]];
  byId("viewer-title").textContent = `${sample.class} / ${sample.path}`;
  const name = element("span", { className: "unseen", textContent: `${sample.class} / ${sample.path}: ` });
  byId("viewer-facts").replaceChildren(name, outcome(sample), facts(sample)); // read aloud as a whole
  byId("position").textContent = `${position + 1} / ${shown.length}`;
  // not disabled: that would take the focus, and with it the keyboard, away from the viewer
  byId("previous").setAttribute("aria-disabled", String(position === 0));
  byId("next").setAttribute("aria-disabled", String(position === shown.length - 1));
  const panels = [];
  if (sample.view) {
    panels.push(panel(sample, sample.view.name, sample.view.image, false));
    panels.push(panel(sample, "outlines", sample.view.image, true));
  }
  const several = Object.keys(sample.maps).length > 1;
  for (const [name, map] of Object.entries(sample.maps)) {
    const fused = name === "fused";
    const title = fused ? (several ? "fused map" : "anomaly map") : `${name} map, own scale`;
    panels.push(panel(sample, title, map, fused && !sample.view));
  }
  byId("panels").replaceChildren(...panels);
  byId("space").hidden = !sample.cloud;
  if (sample.cloud && space.open) draw(sample);
  else clear();
}

function open(position) {
  if (!viewer.open) viewer.showModal();
  show(position);
}

function step(by) {
  if (shown[current + by] !== undefined) show(current + by);
}

function viewerKeys(event) {
  if (event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.shiftKey && event.key.startsWith("Arrow") ? `Shift${event.key}` : event.key;
  const actions = {
    ShiftArrowLeft: () => moveCamera(-TURN, 0, 1),
    ShiftArrowRight: () => moveCamera(TURN, 0, 1),
    ShiftArrowUp: () => moveCamera(0, TURN, 1),
    ShiftArrowDown: () => moveCamera(0, -TURN, 1),
    "+": () => moveCamera(0, 0, 0.8),
    "-": () => moveCamera(0, 0, 1.25),
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    3: toggleSpace,
    p: () => colorSpace("image"),
    s: () => colorSpace("score"),
  };
  if (!actions[key]) return;
  event.preventDefault();
  actions[key]();
}

function closed() {
  space.open = false;
  clear();
  const item = cards.querySelector(`li[data-sample="${shown[current]}"] > button`);
  if (item) item.focus();
}

// 3D view: plotly is unpacked and started on the first request

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

let library;

function loadLibrary() {
  if (!element("canvas").getContext("webgl")) throw new Error("it has no WebGL");
  library ??= inflate(byId("plotly").textContent).then((source) => {
    const text = new TextDecoder().decode(source);
    document.head.append(element("script", { textContent: text }));
    if (!window.Plotly) throw new Error("plotly did not start");
  });
  return library;
}

// Positions in millimeters as the camera sees them: x to the right, y up, z toward it.
async function unpack(cloud) {
  const buffer = await inflate(cloud.data);
  const n = cloud.points;
  const numbers = new DataView(buffer);
  const axis = (k, sign) =>
    Array.from({ length: n }, (_, i) => sign * (cloud.origin[k] + cloud.step * numbers.getInt16(2 * (k * n + i), true)));
  const plane = (k) => new Uint8Array(buffer, (6 + k) * n, n);
  const unpacked = { x: axis(0, 1), y: axis(1, -1), z: axis(2, -1), score: Array.from(plane(0)) };
  if (cloud.colored) {
    const [red, green, blue] = [plane(2), plane(3), plane(4)];
    unpacked.image = Array.from(red, (value, i) => `rgb(${value},${green[i]},${blue[i]})`);
  }
  const [rows, columns] = cloud.grid;
  const bits = new Uint8Array(buffer, (cloud.colored ? 11 : 8) * n);
  const at = new Int32Array(rows * columns).fill(-1); // number of each pixel's point, or -1
  for (let pixel = 0, point = 0; pixel < at.length; pixel++) {
    if ((bits[pixel >> 3] >> (7 - (pixel & 7))) & 1) at[pixel] = point++;
  }
  const close = closeness(unpacked, cloud.grid[1], at);
  return { points: { ...unpacked, ...surface(cloud.grid, at, close) }, at, close, marked: plane(1) };
}

// Test of two neighbors on the cloud's grid, false across a jump in depth.
function closeness(points, columns, at) {
  const apart = (a, b) => Math.hypot(points.x[a] - points.x[b], points.y[a] - points.y[b], points.z[a] - points.z[b]);
  const edges = [];
  for (let pixel = 1; pixel < at.length; pixel++) {
    if (pixel % columns && at[pixel - 1] >= 0 && at[pixel] >= 0) edges.push(apart(at[pixel - 1], at[pixel]));
  }
  const longest = 6 * (edges.sort((a, b) => a - b)[edges.length >> 1] || 0);
  return (a, b) => apart(a, b) <= longest;
}

// Triangles between close neighbors.
function surface([rows, columns], at, close) {
  const [i, j, k] = [[], [], []];
  const add = (a, b, c) => {
    if (Math.min(a, b, c) < 0 || !(close(a, b) && close(b, c) && close(c, a))) return;
    i.push(a);
    j.push(b);
    k.push(c);
  };
  for (let row = 1; row < rows; row++) {
    for (let column = 1; column < columns; column++) {
      const pixel = row * columns + column;
      const [a, b, c, d] = [at[pixel - columns - 1], at[pixel - columns], at[pixel - 1], at[pixel]];
      if (a < 0 || d < 0) add(b, c, Math.max(a, d));
      else {
        add(a, c, d);
        add(a, d, b);
      }
    }
  }
  return { i, j, k };
}

// Lines between the outermost points of a region of the surface, a little in front of it.
function outline(sample, { points, at, close }, inside, name, color) {
  const [rows, columns] = sample.cloud.grid;
  const within = (row, column) => row >= 0 && column >= 0 && row < rows && column < columns && inside(at[row * columns + column]);
  const edge = (row, column) =>
    within(row, column) &&
    !(within(row - 1, column) && within(row + 1, column) && within(row, column - 1) && within(row, column + 1));
  const line = { x: [], y: [], z: [] };
  const lift = 0.004 * Math.hypot(...["x", "y"].map((axis) => span(points[axis])));
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      if (!edge(row, column)) continue;
      for (const [down, right] of [[0, 1], [1, 0], [1, 1], [1, -1]]) {
        if (!edge(row + down, column + right)) continue;
        const ends = [at[row * columns + column], at[(row + down) * columns + column + right]];
        if (!close(...ends)) continue;
        for (const point of ends) {
          line.x.push(points.x[point]);
          line.y.push(points.y[point]);
          line.z.push(points.z[point] + lift);
        }
        for (const axis of ["x", "y", "z"]) line[axis].push(null);
      }
    }
  }
  return { type: "scatter3d", mode: "lines", ...line, line: { color, width: 6 }, name, hoverinfo: "skip" };
}

function outlines(sample, unpacked) {
  const found = [];
  if (sample.bar[1]) {
    const above = (point) => point >= 0 && unpacked.points.score[point] > 127;
    found.push(outline(sample, unpacked, above, "predicted", predicted));
  }
  found.push(outline(sample, unpacked, (point) => point >= 0 && unpacked.marked[point], "ground truth", truth));
  return found.filter((line) => line.x.length);
}

function colors(sample, points) {
  if (points.image && space.color === "image") return { vertexcolor: points.image, lighting: { ...LIGHT, ambient: 0.7 } };
  return {
    intensity: points.score,
    colorscale: heat.map((color, i) => [i / (heat.length - 1), color]),
    cmin: 0,
    cmax: 255,
    lighting: { ...LIGHT, ambient: 0.85, diffuse: 0.3 }, // flatter, so that the colors are those of the bar
    colorbar: {
      title: { text: "anomaly map", side: "top" },
      tickvals: [0, 127.5, 255],
      ticktext: sample.bar,
      ticks: "outside",
      thickness: 12,
      len: 0.7,
      outlinewidth: 0,
    },
  };
}

const lowest = (values) => values.reduce((a, b) => Math.min(a, b));
const span = (values) => values.reduce((a, b) => Math.max(a, b)) - lowest(values);

// Round ticks of an axis, labeled with the coordinates in the file. The plot negates y and z, so their `sign` is -1.
function ticks(values, sign, most) {
  const rough = Math.max(span(values), 1e-6) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [5, 2, 1].map((each) => each * power).find((each) => each <= rough);
  const first = Math.ceil(lowest(values) / step);
  const last = Math.floor((lowest(values) + span(values)) / step);
  const tickvals = Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
  return { tickvals, ticktext: tickvals.map((tick) => score(sign * tick || 0, 6)) };
}

function layout(points) {
  const style = getComputedStyle(document.documentElement);
  const spans = [points.x, points.y, points.z].map((values) => Math.max(span(values), 1e-6));
  const longest = Math.max(...spans);
  const axis = (name, sign, most) => ({
    title: { text: `${name}, mm` },
    ...ticks(points[name], sign, most),
    color: style.getPropertyValue("--soft"),
    gridcolor: style.getPropertyValue("--line"),
    showbackground: false,
    zeroline: false,
  });
  return {
    margin: { l: 0, r: 0, t: 0, b: 0 },
    showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    font: { color: style.getPropertyValue("--ink") },
    scene: {
      aspectmode: "manual", // true to scale, the longest side filling the view
      aspectratio: { x: spans[0] / longest, y: spans[1] / longest, z: spans[2] / longest },
      xaxis: axis("x", 1, 3),
      yaxis: axis("y", -1, 3),
      zaxis: axis("z", -1, spans[2] < longest / 3 ? 1 : 3),
      camera: plot.layout?.scene.camera ?? CAMERA, // it stays where it was turned to
      dragmode: "orbit",
    },
  };
}

async function draw(sample) {
  const request = ++space.drawing;
  const note = byId("space-note");
  plot.hidden = false;
  byId("draw").setAttribute("aria-pressed", "true");
  byId("draw").textContent = "Close 3D view";
  try {
    if (!window.Plotly) note.textContent = "Starting the 3D view …";
    await loadLibrary();
    const unpacked = await unpack(sample.cloud);
    const { points } = unpacked;
    if (request !== space.drawing) return; // another sample was asked for meanwhile
    const trace = { type: "mesh3d", ...points, ...colors(sample, points), hoverinfo: "skip" };
    await Plotly.newPlot(plot, [trace, ...outlines(sample, unpacked)], layout(points), { displayModeBar: false, responsive: true });
    note.textContent = `${sample.cloud.points.toLocaleString("en")} points. Drag to turn; scroll or pinch to zoom.`;
  } catch (error) {
    note.textContent = `This browser cannot draw it (${error.message}).`;
  }
  byId("colors").hidden = !sample.cloud.colored;
  const color = sample.cloud.colored ? space.color : "score";
  for (const button of byId("colors").children) {
    button.setAttribute("aria-pressed", String(button.dataset.color === color));
  }
}

const TURN = Math.PI / 18;

// Turn the view to the right and up by angles in radians, and multiply the distance of the camera by `distance`.
function moveCamera(right, upwards, distance) {
  if (plot.hidden || !plot.layout) return;
  const { eye, center } = plot.layout.scene.camera;
  const [x, y, z] = ["x", "y", "z"].map((axis) => eye[axis] - center[axis]);
  const radius = Math.hypot(x, y, z);
  const azimuth = Math.atan2(x, z) + right;
  const elevation = Math.max(-1.5, Math.min(1.5, Math.asin(y / radius) + upwards));
  const away = distance * radius;
  const [flat, high] = [away * Math.cos(elevation), away * Math.sin(elevation)];
  const moved = { x: center.x + flat * Math.sin(azimuth), y: center.y + high, z: center.z + flat * Math.cos(azimuth) };
  Plotly.relayout(plot, { "scene.camera": { ...CAMERA, center, eye: moved } });
}

function clear() {
  space.drawing++;
  if (window.Plotly) Plotly.purge(plot);
  plot.hidden = byId("colors").hidden = true;
  byId("space-note").textContent = "";
  byId("draw").textContent = "3D view";
  byId("draw").setAttribute("aria-pressed", "false");
}

function toggleSpace() {
  const sample = samples[shown[current]];
  if (!sample.cloud) return;
  space.open = !space.open;
  if (space.open) draw(sample).then(() => plot.scrollIntoView({ block: "nearest" }));
  else clear();
}

function colorSpace(color) {
  space.color = color;
  redraw();
}

function redraw() {
  if (space.open) draw(samples[shown[current]]);
}

cards.append(...samples.map(card));
filter();
openFromDots();
selects.forEach((select) => select.addEventListener("change", filter));
cards.addEventListener("keydown", walkCards);
viewer.addEventListener("keydown", viewerKeys);
viewer.addEventListener("close", closed);
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => viewer.close());
byId("draw").addEventListener("click", toggleSpace);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
for (const button of byId("colors").children) {
  button.addEventListener("click", () => colorSpace(button.dataset.color));
}
