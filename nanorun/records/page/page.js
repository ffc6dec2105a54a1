// What the page does beyond being read: sorts tables, draws charts to the width there is, opens cards.
// Texts come from records that anyone may have written, so they are only ever set as text, never as HTML.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const N_COLORS = 8, N_DASHES = 3;
const MOST_DOTS = 20;
const MARGIN = { left: 52, right: 14, top: 14, bottom: 42 };

function make(parent, name, attributes = {}, text = null) {
  const inside = parent instanceof SVGElement || name === "svg";
  const node = inside ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

const mark = (place) => `k${place % N_COLORS} d${Math.floor(place / N_COLORS) % N_DASHES}`;

const grouped = (number, digits) => number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function large(number) {
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= unit) return `${Number((number / unit).toPrecision(4))}${letter}`;
  }
  return grouped(number, 0);
}

// ---- Charts

// One chart in its figure. What it shows is `axis`, `extent` and the set `shown`; `at` is the point being read.
class Chart {
  constructor(figure, spec, key) {
    Object.assign(this, { figure, spec, key });
    this.plot = figure.querySelector(".plot");
    this.svg = figure.querySelector(".drawing");
    this.reading = figure.querySelector(".reading");
    this.said = figure.querySelector(".said");
    this.buttons = [...figure.querySelectorAll(".legend [data-line]")];
    this.axis = Object.keys(spec.x)[0];
    this.extent = "near";
    this.shown = new Set(spec.lines.keys());
    for (const button of this.buttons) {
      button.disabled = false;
      if (button.getAttribute("aria-pressed") === "false") this.shown.delete(Number(button.dataset.line));
    }
    this.at = null;
    this.raised = null;
    this.width = 0;
    this.listen();
    new ResizeObserver(() => {
      if (this.plot.clientWidth !== this.width) this.draw();
    }).observe(this.plot);
    this.draw();
  }

  listen() {
    const { figure, plot } = this;
    plot.tabIndex = 0;
    plot.setAttribute("role", "application");
    plot.setAttribute("aria-roledescription", "chart");
    plot.setAttribute("aria-labelledby", this.svg.getAttribute("aria-labelledby"));
    plot.setAttribute("aria-describedby", this.svg.getAttribute("aria-describedby"));
    this.svg.setAttribute("aria-hidden", "true");
    plot.addEventListener("pointermove", (event) => this.point(event));
    plot.addEventListener("pointerdown", (event) => this.point(event));
    plot.addEventListener("pointerleave", () => this.read(null));
    plot.addEventListener("keydown", (event) => this.step(event));
    plot.addEventListener("blur", () => this.read(null));
    figure.addEventListener("change", (event) => {
      if (event.target.name.endsWith("-axis")) this.axis = event.target.value;
      else this.extent = event.target.value;
      this.at = null;
      this.draw();
    });
    for (const button of this.buttons) {
      const line = Number(button.dataset.line);
      button.addEventListener("click", () => this.show([line], !this.shown.has(line)));
      for (const [event, raised] of [["pointerenter", line], ["pointerleave", null], ["focus", line], ["blur", null]]) {
        button.addEventListener(event, () => { this.raised = raised; this.draw(); });
      }
    }
    for (const button of figure.querySelectorAll("[data-show]")) {
      button.addEventListener("click", () => this.show(this.spec.lines.keys(), button.dataset.show === "all"));
    }
  }

  show(lines, whether) {
    for (const line of lines) {
      if (whether) this.shown.add(line);
      else this.shown.delete(line);
    }
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(this.shown.has(Number(button.dataset.line))));
    this.at = null;
    this.draw();
  }

  // The functions from values to pixels, and the frame they map into.
  scales() {
    const [whole, y] = this.spec.views[`${this.axis}.${this.extent}`] ?? this.spec.views[`${this.axis}.near`];
    const x = this.spec.kind === "curves" ? this.narrowed(whole) : whole;
    const small = this.spec.kind === "run";
    const width = Math.max(200, this.plot.clientWidth);
    const height = small ? 190 : Math.round(Math.min(400, Math.max(250, width * 0.46)));
    const frame = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const across = (value) => frame.left + ((value - x[0]) / (x[1] - x[0])) * (frame.right - frame.left);
    const down = (value) => frame.bottom - ((value - y[0]) / (y[1] - y[0])) * (frame.bottom - frame.top);
    return { x, y, width, height, frame, across, down };
  }

  // The range up to where the last of the shown lines ends: hidden ones take no room.
  narrowed([low, high, ticks]) {
    const ends = [...this.shown].map((index) => this.spec.lines[index].x[this.axis].at(-1));
    const end = Math.max(...ends) + 0.02 * (Math.max(...ends) - low);
    return ends.length && end > low && end < high ? [low, end, ticks.filter(([value]) => value <= end)] : [low, high, ticks];
  }

  draw() {
    this.width = this.plot.clientWidth;
    if (!this.width) return;
    this.scale = this.scales();
    const { width, height, frame } = this.scale;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    const clip = make(make(this.svg, "defs"), "clipPath", { id: `${this.key}-clip` });
    make(clip, "rect", { x: frame.left, y: frame.top - 4, width: frame.right - frame.left + 6, height: frame.bottom - frame.top + 4 });
    this.drawAxes();
    const inside = make(this.svg, "g", { "clip-path": `url(#${this.key}-clip)` });
    const lines = [...this.shown].sort((a, b) => b - a).map((index) => [index, this.spec.lines[index]]);
    for (const [index, line] of lines) if (line.low) this.drawBand(inside, line, index);
    this.drawTarget();
    for (const [index, line] of lines) this.drawLine(inside, line, index);
    this.drawLabels(lines);
    this.cursor = make(this.svg, "g");
    this.read(this.at);
  }

  drawAxes() {
    const { x, y, frame, across, down } = this.scale;
    for (const [value, label] of y[2]) {
      const place = down(value);
      make(this.svg, "path", { class: "grid", d: `M${frame.left} ${place}H${frame.right}` });
      make(this.svg, "text", { class: "tick", x: frame.left - 8, y: place + 4, "text-anchor": "end" }, label);
    }
    make(this.svg, "path", { class: "axis", d: `M${frame.left} ${frame.bottom}H${frame.right}` });
    const longest = Math.max(1, ...x[2].map(([, label]) => label.length));
    const every = Math.ceil((x[2].length * (longest * 7 + 12)) / (frame.right - frame.left));
    x[2].forEach(([value, label], index) => {
      const place = across(value);
      make(this.svg, "path", { class: "axis", d: `M${place} ${frame.bottom}v4` });
      if (index % every === 0) make(this.svg, "text", { class: "tick", x: place, y: frame.bottom + 18, "text-anchor": "middle" }, label);
    });
    const middle = (frame.left + frame.right) / 2;
    make(this.svg, "text", { class: "axis-name", x: middle, y: frame.bottom + 36, "text-anchor": "middle" }, this.spec.x[this.axis]);
  }

  drawTarget() {
    const { target } = this.spec;
    const { frame, y, down } = this.scale;
    if (target === null || target === undefined || target < y[0] || target > y[1]) return;
    make(this.svg, "path", { class: "target", d: `M${frame.left} ${down(target)}H${frame.right}` });
    make(this.svg, "text", { class: "target-name", x: frame.right - 4, y: down(target) - 6, "text-anchor": "end" }, `target ${target}`);
  }

  places(line, ys = line.y) {
    const { across, down } = this.scale;
    return line.x[this.axis].map((x, index) => [across(x), down(ys[index])].map((value) => Math.round(value * 10) / 10));
  }

  dimmed(index) {
    return this.raised !== null && this.raised !== index && this.shown.has(this.raised) ? " dimmed" : "";
  }

  drawBand(parent, line, index) {
    const edge = [...this.places(line, line.low), ...this.places(line, line.high).reverse()];
    if (!this.dimmed(index)) make(parent, "path", { class: `band ${mark(line.mark)}`, d: `M${edge.map((place) => place.join(" ")).join("L")}Z` });
  }

  drawLine(parent, line, index) {
    const places = this.places(line);
    const classes = `${mark(line.mark)}${this.dimmed(index)}`;
    const path = places.map(([x, y], place) => (place === 0 ? `M${x} ${y}` : line.mode === "steps" ? `H${x}V${y}` : `L${x} ${y}`));
    if (line.mode !== "dots") make(parent, "path", { class: `line ${classes}`, d: path.join(""), "data-line": index });
    if (line.mode !== "dots" && (this.spec.kind === "profiles" || places.length > MOST_DOTS)) return;
    for (const [x, y] of places.slice(0, this.points(line))) {
      make(parent, "circle", { class: `dot ${classes}${line.mode === "dots" ? " hollow" : ""}`, cx: x, cy: y, r: line.mode === "dots" ? 3.5 : 3 });
    }
  }

  // Names beside the points of a staircase, left of them, where it leaves room; the latest come first, and one
  // that would run into another is left out.
  drawLabels(lines) {
    const taken = [];
    for (const [, line] of lines) {
      const places = this.places(line);
      [...(line.labels ?? []).entries()].reverse().forEach(([index, label]) => {
        const [x, y] = places[index];
        const width = label.length * 7;
        const before = x - 8 - width >= this.scale.frame.left;
        const [left, base] = before ? [x - 8 - width, y + 4] : [x + 6, Math.max(y - 8, 12)];
        const box = [left, base - 12, left + width, base + 4];
        if (taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) return;
        taken.push(box);
        make(this.svg, "text", { class: "point-label", x: before ? x - 8 : left, y: base, "text-anchor": before ? "end" : "start" }, label);
      });
    }
  }

  // How many of a line's points can be read: a staircase ends in one that is only its end.
  points(line) {
    return line.notes ? line.notes.length : line.y.length;
  }

  isInside([x, y]) {
    const { frame } = this.scale;
    return x >= frame.left - 1 && x <= frame.right + 1 && y >= frame.top - 4 && y <= frame.bottom + 1;
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let nearest = null, least = Infinity;
    for (const index of this.shown) {
      const line = this.spec.lines[index];
      this.places(line).slice(0, this.points(line)).forEach((place, point) => {
        const distance = (place[0] - x) ** 2 + (place[1] - y) ** 2;
        if (this.isInside(place) && distance < least) [nearest, least] = [{ line: index, point }, distance];
      });
    }
    this.read(nearest);
  }

  // Arrow keys: along the line, and from line to line at about the same place.
  step(event) {
    const lines = [...this.shown].sort((a, b) => a - b);
    const keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "Escape"];
    if (!keys.includes(event.key) || event.ctrlKey || event.metaKey || event.altKey || !lines.length) return;
    event.preventDefault();
    if (event.key === "Escape") { this.read(null); return; }
    const now = this.at;
    let line = now ? now.line : lines[0];
    const last = () => this.points(this.spec.lines[line]) - 1;
    let point = now ? now.point : last();
    if (now && event.key === "ArrowRight") point = Math.min(point + 1, last());
    if (now && event.key === "ArrowLeft") point = Math.max(point - 1, 0);
    if (event.key === "Home") point = 0;
    if (event.key === "End") point = last();
    if (now && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      const x = this.spec.lines[line].x[this.axis][point];
      const next = lines.indexOf(line) + (event.key === "ArrowDown" ? 1 : -1);
      line = lines[(next + lines.length) % lines.length];
      const xs = this.spec.lines[line].x[this.axis].slice(0, last() + 1);
      point = xs.reduce((best, other, index) => (Math.abs(other - x) < Math.abs(xs[best] - x) ? index : best), 0);
    }
    this.read({ line, point });
    this.said.textContent = this.words(line, point).join(", ");
  }

  // The texts of one reading: whose it is, the value, and where.
  words(index, point) {
    const line = this.spec.lines[index];
    if (line.notes) {
      const [name, ...rest] = line.notes[point].split(": ");
      return [name, rest.join(": ")];
    }
    if (this.spec.kind === "profiles") return [line.name, `${Math.round(line.y[point] * 100)} % within τ = ${line.x.tau[point].toFixed(2)}`];
    const range = line.low ? ` (${line.low[point].toFixed(4)} to ${line.high[point].toFixed(4)}, ${line.seeds} seeds)` : "";
    const words = [line.name, `loss ${line.y[point].toFixed(4)}${range}`, `${grouped(line.x.seconds[point], 1)} s`];
    words.push(`step ${grouped(line.x.steps[point], 0)}`, `${large(line.x.tokens[point])} tokens`);
    return words;
  }

  // Show the reading of a point {line, point}, or none.
  read(at) {
    this.at = at;
    this.cursor.replaceChildren();
    this.reading.hidden = at === null;
    if (at === null) return;
    const line = this.spec.lines[at.line];
    const { frame, width, height } = this.scale;
    const [x, y] = this.places(line)[at.point];
    make(this.cursor, "path", { class: "cursor-line", d: `M${x} ${frame.top}V${frame.bottom}` });
    if (this.isInside([x, y])) make(this.cursor, "circle", { class: `cursor-dot ${mark(line.mark)}`, cx: x, cy: y, r: 5 });
    const [name, value, ...where] = this.words(at.line, at.point);
    this.reading.replaceChildren();
    make(this.reading, "b", {}, name);
    make(this.reading, "span", { class: "main" }, value);
    if (where.length) make(this.reading, "span", {}, where.join(" · "));
    const box = { width: this.reading.offsetWidth, height: this.reading.offsetHeight };
    const left = x + 14 + box.width <= width ? x + 14 : x - 14 - box.width;
    const top = y - box.height - 10 >= 0 ? y - box.height - 10 : y + 14;
    this.reading.style.left = `${Math.max(0, Math.min(left, width - box.width))}px`;
    this.reading.style.top = `${Math.max(0, Math.min(top, height - box.height))}px`;
  }
}

// ---- Tables

function compared(a, b, kind, sign) {
  // What is missing stays last, whichever way the rest is sorted.
  if (a === "" || b === "") return (a === "") - (b === "");
  if (kind === "number") return sign * (Number(a) - Number(b));
  return sign * (a < b ? -1 : a > b ? 1 : 0);
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const said = table.closest(".scroll").nextElementSibling;
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.disabled = false;
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compared(key(a), key(b), head.dataset.kind, descending ? -1 : 1));
      table.tBodies[0].append(...rows);
      said.textContent = `Sorted by ${button.textContent}, ${descending ? "descending" : "ascending"}`;
    });
  });
}

// ---- Cards

function addFacts(parent, title, facts) {
  const part = make(parent, "section");
  make(part, "h5", {}, title);
  const list = make(part, "dl", { class: title === "Clock" ? "facts clock" : "facts" });
  for (const [name, value] of facts) {
    make(list, "dt", {}, name);
    make(list, "dd", {}, value);
  }
}

function addRunChart(parent, spec, key) {
  const title = "Validation loss of this run against counted seconds";
  const figure = make(parent, "figure", { class: "chart", "aria-label": title });
  make(figure, "h5", { id: `${key}-title` }, "Validation loss");
  const plot = make(figure, "div", { class: "plot" });
  make(plot, "svg", { class: "drawing", role: "img", "aria-labelledby": `${key}-title`, "aria-describedby": `${key}-text` });
  make(plot, "div", { class: "reading", hidden: "" });
  const { x, y } = spec.lines[0];
  const last = y.length - 1;
  const text = `${title}: from ${y[0].toFixed(4)} at ${x.seconds[0]} s to ${y[last].toFixed(4)} at ${x.seconds[last]} s, target ${spec.target}.`;
  make(figure, "p", { class: "unseen", id: `${key}-text` }, text);
  make(figure, "p", { class: "unseen said", role: "status" });
  return () => new Chart(figure, spec, key);
}

function fill(card) {
  if (card.querySelector(".card-body")) return;
  const run = data.runs[Number(card.dataset.run)];
  const body = make(card, "div", { class: "card-body" });
  make(body, "p", { class: "record-id" }, card.id);
  const grid = make(body, "div", { class: "card-grid" });
  const start = run.chart ? addRunChart(grid, run.chart, `run-${card.dataset.run}`) : null;
  for (const [title, facts] of run.facts) addFacts(grid, title, facts);
  const config = make(grid, "section", { class: "config" });
  make(config, "h5", { id: `config-${card.dataset.run}` }, "Config");
  make(config, "pre", { tabindex: "0", role: "region", "aria-labelledby": `config-${card.dataset.run}` }, data.configs[run.config]);
  if (start) start();
}

function openNamed() {
  let name = "";
  try {
    name = decodeURIComponent(location.hash.slice(1));
  } catch {
    return;
  }
  const named = name && document.getElementById(name);
  if (named instanceof HTMLDetailsElement) named.open = true;
}

// ---- Light and dark

function themed(button) {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  // A page opened as a file may be refused a memory; it then follows the system each time.
  try {
    const kept = localStorage.getItem("nanorun-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* no memory */ }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("nanorun-theme", root.dataset.theme);
    } catch { /* no memory */ }
    show();
  });
  dark.addEventListener("change", show);
  show();
}

document.documentElement.classList.add("with-script");
themed(document.querySelector(".theme"));
document.querySelectorAll(".records:not(.foreign)").forEach(sortable);
for (const figure of document.querySelectorAll("[data-chart]")) new Chart(figure, data.charts[figure.dataset.chart], figure.dataset.chart);
for (const card of document.querySelectorAll(".card")) card.addEventListener("toggle", () => { if (card.open) fill(card); });
addEventListener("hashchange", openNamed);
openNamed();
})();
