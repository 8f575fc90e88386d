// One setting: which model answers, how, and under which weights, with a slider for each expert.

import { element } from "./dom.js";
import { badge, kind } from "./experts.js";

const GROUPS = { mixture: "Mixtures", method: "Methods", expert: "Single experts", base: "Base model" };

export class Setting {
  // `changed` is called when what will be asked has changed, `moved` when a weight was moved by hand.
  constructor(letter, models, changed, moved) {
    Object.assign(this, { letter, models, changed, moved, own: false, sliders: new Map() });
    const field = (label, input) => element("label", {}, `${label} `, input);
    this.model = element("select", { "data-field": "model", change: () => this.choose() }, ...grouped(models));
    this.combiner = element("select", { "data-field": "combiner", change: changed });
    this.top = element("input", { type: "number", min: 1, step: 1, placeholder: "all", "data-field": "top_k", input: changed });
    this.every = element("input", { type: "number", min: 1, step: 1, placeholder: "never", "data-field": "every", input: changed });
    this.temperature = element("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0, "data-field": "temperature", input: changed });
    this.limit = element("input", { type: "number", min: 1, step: 1, value: 256, "data-field": "max_tokens", input: changed });
    this.list = element("ul", { class: "sliders" });
    this.state = element("p", { class: "caption" });
    this.giveBack = element("button", { type: "button", hidden: true, click: () => this.release() }, "Let the router weigh");
    this.weighing = element("fieldset", {}, element("legend", {}, "Weights"), this.state, this.list, this.giveBack);
    this.mixing = element(
      "div", { class: "fields" },
      field("Combiner", this.combiner), field("Top experts", this.top), field("Weigh again every … tokens", this.every),
    );
    this.summary = element("span", { class: "summary" });
    const sampling = element("div", { class: "fields" }, field("Temperature", this.temperature), field("Tokens at most", this.limit));
    this.element = element(
      "details", { class: "setting", open: matchMedia("(min-width: 60rem)").matches },
      element("summary", {}, element("b", {}, letter), " ", this.summary),
      field("Model", this.model), this.mixing, sampling, this.weighing,
    );
    this.choose();
  }

  get entry() {
    return this.models.find((model) => model.id === this.model.value);
  }

  get mixes() {
    return ["mixture", "method"].includes(this.entry.coterie?.kind);
  }

  // Show what the chosen model can do.
  choose() {
    const { router, combiner, combiners = [], reroutes } = this.entry.coterie ?? {};
    const experts = this.mixes ? this.entry.coterie.experts : [];
    this.mixing.hidden = this.weighing.hidden = !this.mixes;
    this.combiner.replaceChildren(element("option", { value: "" }, combiner ?? "as fitted"));
    this.combiner.append(...combiners.filter((name) => name !== combiner).map((name) => element("option", { value: name }, name)));
    this.top.max = experts.length;
    this.every.placeholder = reroutes ? "as fitted" : "never";
    this.router = router;
    this.sliders.clear();
    this.list.replaceChildren(...experts.map((name) => this.slider(name)));
    this.release();
  }

  slider(name) {
    const value = element("output", { class: "number" }, "–");
    const input = element("input", {
      type: "range", min: 0, max: 1, step: 0.01, value: 0, class: kind(name), "aria-label": `Weight of ${name}`, "data-expert": name,
      input: () => this.take(),
    });
    this.sliders.set(name, { input, value });
    return element("li", {}, badge(name), element("span", { class: "name" }, name), input, value);
  }

  // From now on the weights are those of the sliders.
  take() {
    this.own = true;
    this.label();
    for (const { input, value } of this.sliders.values()) value.textContent = (+input.value).toFixed(2);
    this.moved(this);
  }

  // From now on the router weighs again.
  release() {
    const before = this.own;
    this.own = false;
    this.label();
    if (before) this.moved(this);
    this.changed();
  }

  label() {
    this.giveBack.hidden = !this.own;
    this.state.textContent = this.own ? "Yours. In logits their shares count; in layers and weights they act as they are." : `Of the router${this.router ? ` (${this.router})` : ""}. Move one to weigh by hand.`;
    this.summary.textContent = `${this.model.value}${this.mixes && this.own ? ", weighed by hand" : ""}`;
  }

  // Let the sliders show what the router says.
  follow(weights) {
    if (this.own) return;
    for (const [name, { input, value }] of this.sliders) {
      input.value = weights[name] ?? 0;
      value.textContent = (weights[name] ?? 0).toFixed(2);
    }
  }

  get weights() {
    return Object.fromEntries([...this.sliders].map(([name, { input }]) => [name, +input.value]).filter(([, weight]) => weight > 0));
  }

  // Why this cannot be asked, or null.
  get obstacle() {
    if (this.own && !Object.keys(this.weights).length) return `Setting ${this.letter}: all weights are 0. Give one expert a weight above 0.`;
    const wrong = [this.top, this.every, this.temperature, this.limit].find((input) => !input.checkValidity());
    return wrong ? `Setting ${this.letter}: ${wrong.validationMessage}` : null;
  }

  // How experts are mixed, without what only an answer needs; nothing for a model that mixes none.
  get mixture() {
    if (!this.mixes) return {};
    return {
      ...(this.combiner.value && { combiner: this.combiner.value }),
      ...(this.own && { weights: this.weights }),
      ...(this.top.value && !this.own && { top_k: +this.top.value }),
      ...(this.every.value && !this.own && { every: +this.every.value }),
    };
  }

  get body() {
    return {
      model: this.model.value,
      ...(this.temperature.value && { temperature: +this.temperature.value }),
      ...(this.limit.value && { max_tokens: +this.limit.value }),
      ...(this.entry.coterie && this.entry.coterie.kind !== "base" && { coterie: { ...this.mixture, detail: true } }),
    };
  }

  // Take over another setting's choices.
  copy(other) {
    this.model.value = other.model.value;
    this.choose();
    for (const name of ["combiner", "top", "every", "temperature", "limit"]) this[name].value = other[name].value;
    this.follow(Object.fromEntries([...other.sliders].map(([name, { input }]) => [name, +input.value])));
  }
}

// The models by what they are, mixtures first.
function grouped(models) {
  const order = Object.keys(GROUPS);
  const known = order.map((kind) => [GROUPS[kind], models.filter((model) => model.coterie?.kind === kind)]);
  const others = ["Models", models.filter((model) => !order.includes(model.coterie?.kind))];
  return [...known, others].filter(([, own]) => own.length).map(([label, own]) =>
    element("optgroup", { label }, ...own.map(({ id }) => element("option", { value: id }, id))));
}
