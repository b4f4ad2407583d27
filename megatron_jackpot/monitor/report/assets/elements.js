"use strict";
// Elements are made with text alone: nothing a run says is ever read as markup.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined).map((child) =>
    child instanceof Node ? child : document.createTextNode(String(child))));
  return element;
}

function section(id, title, ...children) {
  return make("section", { id }, make("h2", {}, title), ...children);
}

function table(heads, rows, attributes, words) {
  // Columns of numbers end alike, those of words, by their heads, begin alike.
  const kind = (column) => ({ class: (words || []).includes(heads[column]) ? "words" : null });
  const head = make("tr", {}, ...heads.map((text, i) => make("th", kind(i), text)));
  const body = rows.map((row) => row instanceof Node ? row : make("tr", {}, ...row.map((cell, i) => make("td", kind(i), cell))));
  return make("div", { class: "scroll" }, make("table", attributes, make("thead", {}, head), make("tbody", {}, ...body)));
}

// A select of [value, text] pairs; `chosen` is called with the value.
function choice(label, id, pairs, value, chosen) {
  const options = pairs.map(([key, text]) => make("option", { value: key, selected: String(key) === String(value) }, text));
  const select = make("select", { id, on: { change: () => chosen(select.value) } }, ...options);
  return make("label", {}, label + " ", select);
}

function number(value, digits) {
  if (value === null || value === undefined) return "-";
  return Number(value.toPrecision(digits || 3)).toString();
}
