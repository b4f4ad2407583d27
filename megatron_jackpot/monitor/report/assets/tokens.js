"use strict";
// Token by token: what the correction did, filtered and put in order.

const seen = { step: "", verdict: "all", order: "recorded", mark: "all", text: "", more: 1 };
const PAGE = 24;

// Rollouts of all records as {record, place, start, stop, rejected, trained, heaviest}.
function rolloutsOf(tokens) {
  const found = [];
  for (const record of tokens.records) {
    let start = 0;
    for (const rollout of record.rollouts) {
      const stop = start + rollout.length;
      let rejected = 0, trained = 0, heaviest = 0;
      for (let i = start; i < stop; i += 1) {
        const kind = record.kind[i];
        if (kind === "k" || kind === "r") trained += 1;
        if (kind === "r") rejected += 1;
        if (kind === "k") heaviest = Math.max(heaviest, record.weight[i] || 0);
      }
      found.push({ record, rollout, start, stop, rejected, trained, heaviest });
      start = stop;
    }
  }
  return found;
}

const MARKS = {
  all: () => true,
  rejected: (record, i) => record.kind[i] === "r",
  heavy: (record, i) => record.kind[i] === "k" && record.weight[i] > 1,
  light: (record, i) => record.kind[i] === "k" && record.weight[i] < 0.5,
};
const ORDERS = {
  recorded: null,
  rejected: (one) => one.rejected / Math.max(1, one.trained),
  heaviest: (one) => one.heaviest,
};

function facts(record, i) {
  const parts = Object.entries(record.logp).map(([name, logp]) => [name, logp[i] === null ? null : Math.exp(logp[i])]);
  const { policy, server } = record.logp;
  if (policy[i] !== null && server[i] !== null) parts.push(["ratio", Math.exp(Math.min(50, policy[i] - server[i]))]);
  parts.push(["weight", record.weight[i]]);
  return parts.map(([name, value]) => `${name} ${number(value)}`).join(", ");
}

function span(tokens, record, i, mark, wanted) {
  const kind = record.kind[i], text = tokens.texts[record.token[i]];
  const dim = kind === "p" || (mark(record, i) && (!wanted || text === wanted)) ? "" : " dim";
  const said = kind === "p" ? null : kind === "u" ? "the server gave no finite log-prob" : facts(record, i);
  const shade = kind === "k" ? { "--w": (0.12 + 0.33 * Math.min(1, Math.max(0, record.weight[i] || 0))).toFixed(2) } : {};
  const attributes = { class: kind + dim, title: said, style: shade };
  if (said !== null) attributes.on = { click: () => tell(`${JSON.stringify(text)}: ${said}`) };
  return make("span", attributes, text.replace(/\n/g, "\u23ce\n"));
}

function tell(text) {
  const detail = document.getElementById("detail");
  detail.textContent = text;
  detail.hidden = false;
}

function tokensOf(tree) {
  const tokens = tree.tokens;
  if (!tokens) return section("tokens", "Tokens", make("p", {}, tree.runs.length > 1
    ? "The page of a single run shows its tokens." : "None were recorded (logging.tokens_every)."));
  const all = rolloutsOf(tokens), steps = tokens.records.map((record) => record.step);
  if (seen.step !== "all" && !steps.includes(Number(seen.step))) seen.step = "";
  // The newest, as long as none was chosen.
  const current = () => (seen.step === "" ? String(steps[steps.length - 1]) : seen.step);
  const list = make("div", { id: "rollouts" });
  const search = make("input", { id: "text", type: "search", value: seen.text, size: 12, placeholder: "token",
    on: { change: () => { seen.text = search.value; seen.more = 1; show(); } } });

  function show() {
    const mark = MARKS[seen.mark], wanted = seen.text;
    let some = all.filter((one) => current() === "all" || one.record.step === Number(current()));
    if (seen.verdict !== "all") some = some.filter((one) => one.rollout.right === (seen.verdict === "right"));
    some = some.filter((one) => {
      if (seen.mark === "all" && !wanted) return true;
      for (let i = one.start; i < one.stop; i += 1) {
        const { record } = one;
        if (record.kind[i] !== "p" && mark(record, i) && (!wanted || tokens.texts[record.token[i]] === wanted)) return true;
      }
      return false;
    });
    const order = ORDERS[seen.order];
    if (order) some = [...some].sort((a, b) => order(b) - order(a));
    const shown = some.slice(0, PAGE * seen.more);
    list.replaceChildren(make("p", { id: "count" }, `${some.length} of ${all.length} rollouts` +
      (tokens.omitted ? `; ${tokens.omitted} recorded ones are left out of the page` : "")),
    ...shown.map((one) => rolloutElement(tokens, one, mark, wanted)));
    if (some.length > shown.length) list.append(make("button", { on: { click: () => { seen.more += 1; show(); } } }, "more"));
  }

  const change = (key) => (value) => { seen[key] = value; seen.more = 1; show(); };
  const controls = make("p", { class: "controls" },
    choice("step", "step", [...steps.map((step) => [step, step]), ["all", "all"]], current(), change("step")),
    choice("rollouts", "verdict", [["all", "all"], ["right", "right"], ["wrong", "wrong"]], seen.verdict, change("verdict")),
    choice("order", "order", [["recorded", "as recorded"], ["rejected", "most rejected first"], ["heaviest", "largest weight first"]],
      seen.order, change("order")),
    choice("tokens", "mark", [["all", "all"], ["rejected", "rejected"], ["heavy", "weight above 1"], ["light", "weight below 0.5"]],
      seen.mark, change("mark")),
    make("label", {}, "text ", search),
    make("button", { id: "reset", on: { click: () => {
      Object.assign(seen, { step: "", verdict: "all", order: "recorded", mark: "all", text: "", more: 1 });
      for (const id of ["step", "verdict", "order", "mark"]) document.getElementById(id).value = id === "step" ? current() : seen[id];
      search.value = "";
      show();
    } } }, "reset"));
  const rejected = table(["token", "seen", "rejected", "share", "median p(policy) / p(server)"], tokens.rejected.map(
    ([place, count, lost, ratio]) => make("tr", { class: "choose", on: { click: () => {
      Object.assign(seen, { step: "all", mark: "rejected", text: tokens.texts[place], more: 1 });
      document.getElementById("step").value = "all";
      document.getElementById("mark").value = "rejected";
      search.value = seen.text;
      show();
      list.scrollIntoView({ block: "nearest" });
    } } }, ...[JSON.stringify(tokens.texts[place]), count, lost, (lost / count).toFixed(2), number(ratio)].map(
      (cell) => make("td", {}, cell)))), { id: "rejected" });
  show();
  const [counted, recorded] = tokens.counted, of = counted < recorded ? ` of the last ${counted} of ${recorded} records` : "";
  return section("tokens", "Token by token", make("p", {}, `Of the ${tokens.recorded} recorded tokens${of}, those that are `
    + "rejected most often; a click shows where."), rejected, legend(), controls, list);
}

function rolloutElement(tokens, one, mark, wanted) {
  const { record, rollout } = one, [epoch, prompt, sample] = rollout.id;
  const head = `step ${record.step}, prompt ${prompt}, sample ${sample}, epoch ${epoch}: ${rollout.right ? "right" : "wrong"}, `
    + `advantage ${number(rollout.advantage)}, ${one.rejected} of ${one.trained} rejected`;
  const spans = [];
  for (let i = one.start; i < one.stop; i += 1) spans.push(span(tokens, record, i, mark, wanted));
  return make("div", { class: "rollout" + (rollout.right ? " right" : "") }, make("small", {}, head), "\n", ...spans);
}

function legend() {
  return make("p", { class: "rollout" }, make("span", { class: "p" }, "prompt"), " ",
    make("span", { class: "k", style: { "--w": 0.45 } }, "accepted"), " ",
    make("span", { class: "k", style: { "--w": 0.12 } }, "accepted, small weight"), " ",
    make("span", { class: "r" }, "rejected"), " ", make("span", { class: "u" }, "not scored"), "\n",
    make("small", {}, "Point at a token, or click it, for its probabilities under policy, server and trainer's actor where "
      + "there is one, the ratio that decides, and its weight."));
}
