"use strict";
// Curves: one uPlot a chart, zoomed together; smoothing, and seeds as bands. What is chosen outlives new data.

const COLORS = ["#1f6fb4", "#d95f02", "#1b8a5a", "#c2185b", "#7b4fb5", "#8c6d1f", "#0097a7", "#616161", "#e08e00", "#5c6bc0"];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]], FRAMES = ["solid", "dashed", "dotted", "double"];
const chosen = { smooth: 0, bands: true, range: null, hidden: new Set(), metric: "" };
let plots = [];
const LONGEST_NAME = 28;  // Letters of a run's name that fit before a metric's in a legend.

// An exponential mean without the bias towards its first value; `weight` in [0, 1).
function smoothed(values, weight) {
  let mean = 0, share = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + 1 - weight;
    return mean / share;
  });
}

function stepsOf(runs, metrics) {
  const steps = new Set();
  for (const run of runs) for (const name of metrics) if (run.points[name]) run.points[name][0].forEach((s) => steps.add(s));
  return [...steps].sort((a, b) => a - b);
}

function aligned(points, steps) {
  const at = new Map(points[0].map((step, i) => [step, points[1][i]]));
  return steps.map((step) => (at.has(step) ? at.get(step) : null));
}

function over(columns, steps, reduce) {
  return steps.map((_, i) => {
    const values = columns.map((column) => column[i]).filter((value) => value !== null);
    return values.length ? reduce(values) : null;
  });
}

// What is drawn in a colour of its own: {color, mark, name, members}, seeds together where they are a band. The mark
// is the name, or a number where names are too long for every legend: 2, and 2.1 for the first seed of the second.
function drawnRuns(tree) {
  const drawn = tree.groups.flatMap((group, g) => {
    const many = group.members.length > 1, own = (i) => tree.runs[i].label || tree.runs[i].name;
    if (!many || chosen.bands) return [{ color: COLORS[g % COLORS.length], mark: `${g + 1}`, name: group.label, members: group.members }];
    return group.members.map((i, k) => ({ color: COLORS[i % COLORS.length], mark: `${g + 1}.${k + 1}`, name: own(i), members: [i] }));
  });
  const short = drawn.every((one) => one.name.length <= LONGEST_NAME);
  return drawn.map((one) => (short ? { ...one, mark: one.name } : one));
}

// Lines of a chart: {label, color, dash, values, faint | bound}, bounds in pairs behind their line.
function linesOf(tree, metrics, steps) {
  const lines = [], single = tree.runs.length === 1;
  drawnRuns(tree).forEach((drawn) => metrics.forEach((name, m) => {
    const members = drawn.members.filter((i) => tree.runs[i].points[name]);
    if (!members.length) return;
    const raw = members.map((i) => aligned(tree.runs[i].points[name], steps));
    const columns = raw.map((column) => (chosen.smooth ? smoothed(column, chosen.smooth) : column));
    const color = single ? COLORS[m % COLORS.length] : drawn.color, short = metrics.length > 1 || single ? name : "";
    const many = drawn.members.length > 1;
    const label = [drawn.mark, short, many ? `(${members.length} seeds)` : ""].filter(Boolean).join(" ");
    const values = over(columns, steps, (v) => v.reduce((a, b) => a + b) / v.length);
    // One that lies upon another of one run lets it be seen.
    const hidden = single && lines.some((line) => !line.faint && line.values.join() === values.join());
    if (chosen.smooth && !many) lines.push({ label, color, faint: true, values: raw[0] });
    lines.push({ label, color, dash: single ? DASHES[hidden ? 1 : 0] : DASHES[m % DASHES.length], values });
    if (members.length > 1) {
      lines.push({ label, color, bound: true, values: over(columns, steps, (v) => Math.max(...v)) });
      lines.push({ label, color, bound: true, values: over(columns, steps, (v) => Math.min(...v)) });
    }
  }));
  return lines;
}

function drawn(line) {
  const count = line.values.filter((value) => value !== null).length;
  const shown = !chosen.hidden.has(line.label);
  if (line.bound) return { label: line.label, show: shown, class: "extra", width: 0, points: { show: false }, spanGaps: true };
  return {
    label: line.label, show: shown, class: line.faint ? "extra" : null, spanGaps: true, dash: line.dash,
    stroke: line.faint ? line.color + "40" : line.color, width: line.faint ? 1 : 1.8,
    points: { show: !line.faint && count < 40, size: 5, fill: line.color },
    value: (_, value) => number(value, 4),
  };
}

function bandsOf(lines) {
  const bands = [];
  for (let i = 0; i < lines.length; i += 1) {
    if (!lines[i].bound) continue;
    bands.push({ series: [i + 1, i + 2], fill: lines[i].color + "2e" });
    i += 1;
  }
  return bands;
}

function zoom(range) {
  chosen.range = range;
  for (const plot of plots) {
    const [low, high] = range || plot.whole;
    if (plot.scales.x.min !== low || plot.scales.x.max !== high) plot.setScale("x", { min: low, max: high });
  }
  const button = document.getElementById("whole");
  if (button) button.disabled = range === null;
}

function draw(tree, chart, place) {
  const steps = stepsOf(tree.runs, chart.metrics), lines = linesOf(tree, chart.metrics, steps);
  const width = Math.max(240, place.clientWidth), first = steps[0], last = steps[steps.length - 1];
  const whole = first === last ? [first - 1, first + 1] : [first, last];
  const range = chosen.range || whole;
  const axis = { stroke: "#555", grid: { stroke: "#eee", width: 1 }, ticks: { stroke: "#ccc", width: 1 }, font: "12px system-ui, sans-serif" };
  const plot = new uPlot({
    width, height: 210, series: [{ label: "step" }, ...lines.map(drawn)], bands: bandsOf(lines),
    scales: { x: { time: false, min: range[0], max: range[1] } },
    axes: [{ ...axis, space: 60, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 100000] },
      { ...axis, size: 58, space: 34, values: (_, ticks) => ticks.map((tick) => number(tick, 4)) }],
    // The square before a name is framed as its line is drawn.
    legend: { markers: { dash: (_, index) => FRAMES[Math.max(0, DASHES.indexOf((lines[index - 1] || {}).dash))] } },
    cursor: { sync: { key: "step" }, drag: { x: true, y: false, uni: 20 }, points: { size: 7 } },
    hooks: {
      setSelect: [(u) => {
        if (u.select.width < 5) return;
        const low = u.posToVal(u.select.left, "x"), high = u.posToVal(u.select.left + u.select.width, "x");
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        if (high > low) zoom([low, high]);
      }],
      setSeries: [(u, index, change) => {
        if (index === null || change.show === undefined || u.busy) return;
        const label = u.series[index].label;
        if (change.show) chosen.hidden.delete(label); else chosen.hidden.add(label);
        u.busy = true;
        u.series.forEach((one, i) => { if (i && i !== index && one.label === label) u.setSeries(i, { show: change.show }); });
        u.busy = false;
      }],
    },
  }, [steps, ...lines.map((line) => line.values)], place);
  plot.whole = whole;
  // A double click shows all steps again, in every chart.
  plot.over.addEventListener("dblclick", () => zoom(null));
  plots.push(plot);
}

function chartsOf(tree) {
  const names = [...new Set(tree.runs.flatMap((run) => Object.keys(run.points)))].sort();
  if (!names.includes(chosen.metric)) chosen.metric = "";
  const places = make("div", { class: "charts" });
  const cards = tree.charts.map((chart) => [chart, card(tree, chart)]);
  places.append(...cards.map(([, one]) => one));
  const any = make("div", { class: "charts" });
  const showAny = () => {
    plots = plots.filter((plot) => any.contains(plot.root) ? (plot.destroy(), false) : true);
    any.replaceChildren();
    if (!chosen.metric) return;
    const chart = { title: chosen.metric, help: tree.meanings[chosen.metric] || "", metrics: [chosen.metric] };
    const one = card(tree, chart);
    any.append(one);
    draw(tree, chart, one.querySelector(".plot"));
  };
  const slider = make("input", { type: "range", id: "smooth", min: 0, max: 0.98, step: 0.02, value: chosen.smooth,
    on: { input: () => { chosen.smooth = Number(slider.value); redraw(); } } });
  const bands = make("input", { type: "checkbox", id: "bands", checked: chosen.bands,
    on: { change: () => { chosen.bands = bands.checked; redraw(); } } });
  const whole = make("button", { id: "whole", disabled: chosen.range === null, on: { click: () => zoom(null) } }, "all steps");
  const seeds = tree.groups.some((group) => group.members.length > 1);
  const key = make("div", { id: "key" });
  function redraw() {
    const named = drawnRuns(tree).filter((one) => one.mark !== one.name);
    key.replaceChildren(...named.map((one) => make("div", {},
      make("i", { class: "square", style: { background: one.color } }), make("b", {}, one.mark), " ", one.name)));
    plots.forEach((plot) => plot.destroy());
    plots = [];
    for (const [chart, one] of cards) {
      const place = one.querySelector(".plot");
      place.replaceChildren();
      draw(tree, chart, place);
    }
    showAny();
  }
  const controls = make("p", { class: "controls" }, make("label", {}, "smoothing ", slider),
    seeds ? make("label", {}, bands, " seeds as bands") : null, whole,
    make("small", {}, "Drag across a curve to zoom, in all of them; click a name to hide its line."));
  const other = make("p", { class: "controls" }, choice("another metric", "metric",
    [["", "choose"], ...names.map((name) => [name, name])], chosen.metric, (name) => { chosen.metric = name; showAny(); }));
  return { element: section("curves", "Curves", controls, key, places, other, any), redraw };
}

function card(tree, chart) {
  const title = make("h3", { title: chart.metrics.map((name) => `${name}: ${tree.meanings[name] || ""}`).join("\n") }, chart.title);
  if (chart.help) title.append(make("small", {}, chart.help));
  return make("div", { class: "chart" }, title, make("div", { class: "plot" }));
}
