"use strict";
// The page from its tree; served live, it asks for a newer one and draws itself anew.

const answers = { step: "", which: "wrong" };
const allocated = { step: "" };
const MARK = { true: "\u2713", false: "\u2717" };

function headOf(tree) {
  const title = tree.runs.length === 1 ? tree.runs[0].name : `${tree.runs.length} runs`;
  document.title = title;
  const live = tree.live_s ? make("span", { id: "live" }, "live") : null;
  const verdicts = tree.runs.map((run) => make("p", { class: `verdict ${run.verdict.state}` },
    tree.runs.length > 1 ? make("b", {}, (run.label || run.name) + ": ") : null, run.verdict.text));
  const notes = tree.runs.flatMap((run) => run.findings.filter((one) => one.level === "note").map((one) => one.text));
  const more = notes.length ? make("details", { id: "notes" }, make("summary", {}, notes.length === 1 ? "1 note from the logs" : `${notes.length} notes from the logs`),
    make("ul", {}, ...notes.map((text) => make("li", {}, text)))) : null;
  document.getElementById("head").replaceChildren(make("h1", {}, title, " ", live),
    make("p", { class: "made" }, `as of ${tree.made}`), ...verdicts, ...(more ? [more] : []));
}

function numbersOf(tree) {
  if (tree.runs.length === 1) {
    const measured = tree.runs[0].numbers.filter(([, ...cells]) => cells.some((cell) => cell !== "-"));
    return section("numbers", "Numbers", table(["metric", "first", "last", "best"], measured));
  }
  const rows = new Map();
  tree.runs.forEach((run, place) => run.numbers.forEach(([name, , last, best]) => {
    if (last === "-") return;
    if (!rows.has(name)) rows.set(name, tree.runs.map(() => "-"));
    rows.get(name)[place] = best === "" ? last : `${last} (${best})`;
  }));
  const heads = ["last (best)", ...tree.runs.map((run) => run.label || run.name)];
  return section("numbers", "Numbers", table(heads, [...rows].map(([name, cells]) => [name, ...cells])));
}

function phasesOf(tree) {
  const shown = tree.runs.filter((run) => run.phases.length);
  if (!shown.length) return null;
  const names = [...new Set(shown.flatMap((run) => run.phases.map(([name]) => name)))];
  const color = (name) => COLORS[names.indexOf(name) % COLORS.length];
  const longest = Math.max(...shown.map((run) => run.phases.reduce((sum, [, s]) => sum + s, 0))) || 1;
  const bars = shown.map((run) => {
    const parts = run.phases.map(([name, seconds]) => make("i", { title: `${name}: ${number(seconds)} s`,
      style: { width: `${(100 * seconds) / longest}%`, background: color(name) } }));
    return make("div", { class: "bar" }, tree.runs.length > 1 ? make("small", {}, run.label || run.name) : null,
      make("div", {}, ...parts));
  });
  const heads = ["median seconds", ...(tree.runs.length > 1 ? shown.map((run) => run.label || run.name) : ["", "share"])];
  // What takes nothing anywhere is no row.
  const taken = names.filter((name) => shown.some((run) => new Map(run.phases).get(name) >= 0.0005));
  const rows = taken.map((name) => {
    const values = shown.map((run) => new Map(run.phases).get(name));
    const whole = shown[0].phases.reduce((sum, [, s]) => sum + s, 0) || 1;
    const cells = values.map((value) => number(value));
    if (tree.runs.length === 1) cells.push(`${((100 * values[0]) / whole).toFixed(0)}%`);
    const square = make("i", { class: "square", style: { background: color(name) } });
    return [make("span", {}, square, name), ...cells];
  });
  return section("phases", "Where a step's time goes", ...bars, table(heads, rows));
}

// By set and task; of one the policy first.
function inOrder([one], [other]) {
  const place = ([set, task, model]) => [set, task, model === "policy" ? "" : model].join("\n");
  return place(one) < place(other) ? -1 : 1;
}

// Accuracy of each task, or named set: metrics eval/.../MODEL_accuracy/TASK.
function tasksOf(tree) {
  const found = new Map();
  tree.runs.forEach((run, place) => {
    for (const [name, [, values]] of Object.entries(run.points)) {
      const match = /^eval\/(?:(.+?)\/)?([a-z]+)_accuracy\/(.+)$/s.exec(name);
      if (!match) continue;
      const key = JSON.stringify([match[1] || "", match[3], match[2]]);
      if (!found.has(key)) found.set(key, tree.runs.map(() => "-"));
      const known = values.filter((value) => value !== null);
      if (known.length) found.get(key)[place] = `${known[0].toFixed(3)} \u2192 ${known[known.length - 1].toFixed(3)}`;
    }
  });
  if (!found.size) return null;
  const heads = ["set, task", "model", ...tree.runs.map((run) => (tree.runs.length > 1 ? run.label || run.name : "first \u2192 last"))];
  return section("tasks", "Accuracy per task", table(heads, [...found].map(([key, cells]) => [JSON.parse(key), cells]).sort(inOrder).map(([[set, task, model], cells]) => {
    return [[set, task].filter(Boolean).join(", "), model, ...cells];
  })));
}

function evaluationsOf(tree) {
  if (!tree.evaluations) return null;
  return section("evaluations", "Evaluated afterwards",
    make("p", {}, "by megatron-jackpot evaluate: answers drawn at T; avg is the mean over all of them, cut the share that reached the limit"),
    table(tree.evaluations.heads, tree.evaluations.rows, {}, ["run", "model", "set"]));
}

function allocatedOf(tree) {
  if (!tree.allocated) return null;
  const { steps, prompts } = tree.allocated;
  const names = steps.map(([step]) => String(step));
  if (!names.includes(allocated.step)) allocated.step = "";
  // The newest, as long as none was chosen.
  const step = () => (allocated.step === "" ? names[names.length - 1] : allocated.step);
  const place = make("div", { id: "allocated-prompts" });
  function show() {
    place.replaceChildren(table(["prompt", "asked for in round", "planned", "rollouts", "rounds", "correct", "rewards", "trained on"],
      prompts[step()].map(([prompt, round, planned, rollouts, rounds, correct, live, trained]) =>
        [prompt, round, planned, rollouts, rounds, correct, live ? "differ" : rollouts ? "equal" : "lost", trained ? "yes" : "no"])));
  }
  show();
  return section("allocated", "What the allocator did",
    table(["step", "prompts", "of these fetched", "rollouts planned", "rollouts", "correct", "groups that differ", "groups trained on"], steps),
    make("p", { class: "controls" }, choice("prompts of step", "allocated-step", names.map((one) => [one, one]), step(),
      (value) => { allocated.step = value; show(); })), place);
}

function answersOf(tree) {
  if (!tree.samples.length) return null;
  const steps = [...new Set(tree.samples.map((one) => one.step))];
  if (!steps.includes(Number(answers.step))) answers.step = "";
  // The newest, as long as none was chosen.
  const step = () => Number(answers.step === "" ? steps[steps.length - 1] : answers.step);
  const place = make("div", { id: "answers" });
  function show() {
    const rows = tree.samples.filter((one) => one.step === step());
    const evaluated = new Map();
    for (const one of rows.filter((row) => row.kind === "evaluation")) {
      const key = JSON.stringify([one.set, one.prompt]);
      if (!evaluated.has(key)) evaluated.set(key, []);
      evaluated.get(key).push(one);
    }
    const cards = [];
    for (const given of evaluated.values()) {
      if (answers.which === "wrong" && given.every((one) => one.correct)) continue;
      cards.push(answerCard(given[0], given.map((one) => [one.model, one.text, one.correct])));
    }
    const rolled = rows.filter((row) => row.kind === "rollout").map((one) => answerCard(one, [
      ["a rollout", one.text, false, one.finish === "length" ? "cut at the limit" : ""],
      ...(one.right === null || one.right === undefined ? [] : [["another rollout", one.right, true]])]));
    place.replaceChildren(
      ...(evaluated.size ? [make("h3", {}, "Held-out problems"), ...(cards.length ? cards : [make("p", {}, "All of them right.")])] : []),
      ...(rolled.length ? [make("h3", {}, "Wrong rollouts beside the right answer"), ...rolled] : []));
  }
  const controls = make("p", { class: "controls" },
    choice("step", "answers-step", steps.map((one) => [one, one]), step(), (value) => { answers.step = value; show(); }),
    choice("problems", "answers-which", [["wrong", "with a wrong answer"], ["all", "all"]], answers.which,
      (value) => { answers.which = value; show(); }));
  show();
  return section("samples", "Answers", controls, place);
}

function answerCard(problem, given) {
  const text = (name, content, mark, note) => make("div", { class: "given " + (mark === undefined ? "" : mark ? "right" : "wrong") },
    make("small", {}, [mark === undefined ? "" : MARK[mark], name, note].filter(Boolean).join(" ")), make("pre", {}, content));
  return make("div", { class: "answer" },
    text([problem.set, problem.task].filter(Boolean).join(", ") || "prompt", problem.prompt),
    make("div", { class: "beside" }, text("right answer", problem.answer),
      ...given.map(([name, content, mark, note]) => text(name, content, mark, note))));
}

function factsOf(tree) {
  return section("facts", "What was run", ...tree.runs.map((run) => make("details", { open: tree.runs.length === 1 },
    make("summary", {}, run.name), table(["", ""], run.facts, { class: "facts" }))));
}

let curvesNow = null;

function drawPage(tree) {
  plots.forEach((plot) => plot.destroy());
  plots = [];
  headOf(tree);
  curvesNow = chartsOf(tree);
  const parts = [curvesNow.element, numbersOf(tree), phasesOf(tree), tasksOf(tree), evaluationsOf(tree), allocatedOf(tree), answersOf(tree), tokensOf(tree), factsOf(tree)];
  document.getElementById("body").replaceChildren(...parts.filter(Boolean));
  curvesNow.redraw();
}

async function follow(tree) {
  const said = () => document.getElementById("live");
  try {
    const reply = await fetch(`data?than=${encodeURIComponent(tree.version)}`, { cache: "no-store" });
    if (reply.status === 200) {
      tree = { ...(await reply.json()), live_s: tree.live_s };
      drawPage(tree);
    } else if (reply.status !== 204) throw new Error(await reply.text());
    said().textContent = "live";
    said().className = "";
  } catch (error) {
    said().textContent = "no news: " + error.message;
    said().className = "lost";
  }
  setTimeout(() => follow(tree), 1000 * tree.live_s);
}

const first = JSON.parse(document.getElementById("data").textContent);
drawPage(first);
let resizing = 0;
let width = document.body.clientWidth;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    curvesNow.redraw();
  }, 150);
});
if (first.live_s) setTimeout(() => follow(first), 1000 * first.live_s);
