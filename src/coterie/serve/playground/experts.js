// How experts are drawn: a number and a colour each, the same everywhere on the page and as in the report.

import { element } from "./dom.js";

const COLOURS = 12; // experts beyond them share one more
const MOST_IN_WORDS = 12;
const numbers = new Map();

// Number experts in the order in which they are met.
export function meet(names) {
  for (const name of names) if (!numbers.has(name)) numbers.set(name, numbers.size);
}

export function kind(name) {
  meet([name]);
  return `k${Math.min(numbers.get(name), COLOURS)}`;
}

export function badge(name) {
  const number = (meet([name]), numbers.get(name));
  return element("span", { class: `badge ${kind(name)}`, "aria-hidden": "true" }, number < COLOURS ? `${number + 1}` : "…");
}

// Weights as shares of their sum.
export function shares(weights) {
  const sum = Object.values(weights).reduce((total, weight) => total + weight, 0);
  return Object.fromEntries(Object.entries(weights).map(([name, weight]) => [name, sum ? weight / sum : 0]));
}

export const leader = (weights) => Object.entries(weights).reduce((best, own) => (own[1] > best[1] ? own : best))[0];

export function mean(list) {
  const sums = {};
  for (const weights of list) for (const [name, weight] of Object.entries(weights)) sums[name] = (sums[name] ?? 0) + weight / list.length;
  return sums;
}

// The largest weights, in the order of the experts.
export function inWords(weights) {
  const largest = new Set(Object.entries(weights).sort((a, b) => b[1] - a[1]).slice(0, MOST_IN_WORDS).map(([name]) => name));
  const words = Object.entries(weights).filter(([name]) => largest.has(name)).map(([name, weight]) => `${name} ${weight.toFixed(2)}`);
  const rest = Object.keys(weights).length - largest.size;
  return words.join(", ") + (rest ? `, ${rest} smaller` : "");
}

// One bar whose parts are the experts' shares.
export function splitBar(weights) {
  const parts = Object.entries(shares(weights)).filter(([, share]) => share > 0).map(([name, share]) => {
    const part = element("span", { class: kind(name) }, share > 0.08 ? badge(name).textContent : "");
    part.style.flexGrow = share;
    return part;
  });
  return element("div", { class: "split", role: "img", "aria-label": inWords(shares(weights)) }, ...parts);
}

// One line for each expert: number, name, bar, weight.
export class Bars {
  constructor() {
    this.caption = element("p", { class: "caption" });
    this.list = element("ul", { class: "bars" });
    this.lines = new Map();
    this.element = element("div", { class: "weights" }, this.caption, this.list);
  }

  show(weights, caption) {
    this.caption.textContent = caption;
    for (const [name, weight] of Object.entries(weights)) {
      const { fill, value } = this.lines.get(name) ?? this.add(name);
      fill.style.width = `${100 * weight}%`;
      value.textContent = weight.toFixed(2);
    }
    for (const [name, { line }] of this.lines) line.hidden = !(name in weights);
  }

  add(name) {
    const fill = element("span", { class: `fill ${kind(name)}` });
    const value = element("span", { class: "number" });
    const line = element("li", {}, badge(name), element("span", { class: "name" }, name), element("span", { class: "track" }, fill), value);
    this.list.append(line);
    this.lines.set(name, { line, fill, value });
    return this.lines.get(name);
  }
}
