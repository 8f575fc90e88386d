// One answer: its text as it streams, coloured by who leads, the weights beside it, and the code that asks for it.

import { chat, heldKey, Trouble } from "./api.js";
import { curl, python } from "./code.js";
import { element } from "./dom.js";
import { Bars, badge, inWords, kind, leader, mean, shares } from "./experts.js";

export class Answer {
  constructor(title) {
    this.text = "";
    this.tokens = []; // {span, weights}
    this.routed = null; // the weights of the prompt
    this.onWeights = () => {};
    this.title = element("h3", {}, title);
    this.words = element("div", { class: "words", dir: "auto", role: "group", "aria-label": `Answer of ${title}`, keydown: (event) => this.walk(event) });
    this.bars = new Bars();
    this.bars.element.hidden = true;
    this.trouble = element("p", { class: "trouble", role: "alert", hidden: true });
    this.note = element("p", { class: "caption" });
    this.code = element("details", { class: "code", hidden: true }, element("summary", {}, "The same in curl and Python"));
    this.element = element("article", { class: "answer", "aria-busy": "true" }, this.title, this.words, this.trouble, this.note, this.bars.element, this.code);
  }

  // Ask, and show the answer while it comes; never throws. Returns whether it ended as it should.
  async ask(body, signal) {
    this.showCode(body);
    const started = performance.now();
    try {
      const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
      for await (const chunk of chat(streamed, signal)) this.take(chunk, performance.now() - started);
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.note.textContent = "Stopped.";
      else this.fail(error instanceof Trouble ? error.message : `The page failed: ${error.message}`);
      return false;
    } finally {
      this.element.setAttribute("aria-busy", "false");
    }
  }

  take(chunk, elapsed) {
    for (const choice of chunk.choices ?? []) {
      const told = choice.coterie;
      if (told?.weights) this.routed = shares(told.weights);
      if (told?.tokens?.length) for (const token of told.tokens) this.add(token.text, token.weights ? shares(token.weights) : this.routed);
      else if (choice.delta?.content) this.add(choice.delta.content, this.routed);
      if (choice.finish_reason === "length") this.ending = "cut off at the token limit";
    }
    if (chunk.usage) {
      const { completion_tokens: count } = chunk.usage;
      const seconds = elapsed / 1000;
      this.note.textContent = [`${count} token${count === 1 ? "" : "s"}`, `${seconds.toFixed(1)} s`, this.ending].filter(Boolean).join(", ");
    }
    if (this.routed || this.tokens.some((token) => token.weights)) this.showMean();
  }

  // Add a token's text to the run of its leading expert. A text may be empty: a character can take several tokens.
  add(text, weights) {
    this.text += text;
    const place = this.tokens.length;
    const span = text && weights ? element("span", { class: "token" }, text) : null;
    this.tokens.push({ span, weights });
    if (!span) return this.words.append(text);
    const name = leader(weights);
    const words = `token ${place + 1}: ${inWords(weights)}`;
    for (const [attribute, value] of Object.entries({ "data-weights": words, "aria-description": words, tabindex: this.run ? -1 : 0 })) span.setAttribute(attribute, value);
    for (const event of ["pointerenter", "focus"]) span.addEventListener(event, () => this.bars.show(weights, `Weights of token ${place + 1}`));
    for (const event of ["pointerleave", "blur"]) span.addEventListener(event, () => this.showMean());
    span.addEventListener("click", () => span.focus());
    if (this.run?.name !== name) {
      this.run = { name, element: element("span", { class: `run ${kind(name)}` }, badge(name)) };
      this.words.append(this.run.element);
    }
    this.run.element.append(span);
  }

  // Arrow keys, Home and End go from token to token; the answer is one stop of the Tab key.
  walk(event) {
    const spans = this.tokens.map((token) => token.span).filter(Boolean);
    const place = spans.indexOf(document.activeElement);
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (place < 0 || next === undefined || !spans[next]) return;
    event.preventDefault();
    spans[place].tabIndex = -1;
    spans[next].tabIndex = 0;
    spans[next].focus();
  }

  get weights() {
    const known = this.tokens.map((token) => token.weights).filter(Boolean);
    return known.length ? mean(known) : this.routed;
  }

  showMean() {
    const weights = this.weights;
    this.bars.element.hidden = false;
    this.bars.show(weights, "Weights, mean of the answer");
    this.onWeights(weights);
  }

  fail(message) {
    this.trouble.textContent = message;
    this.trouble.hidden = false;
  }

  showCode(body) {
    const keyed = Boolean(heldKey());
    this.code.hidden = false;
    for (const [name, text] of [["curl", curl(body, keyed)], ["Python", python(body, keyed)]]) {
      const code = element("code", {}, text);
      const copy = element("button", { type: "button", "aria-label": `Copy ${name}`, click: () => copied(copy, code) }, "Copy");
      const block = element("pre", { tabindex: 0, "data-language": name, "aria-label": name }, code);
      this.code.append(element("div", { class: "language" }, element("h4", {}, name), copy), block);
    }
  }
}

// Copy; where a page may not, as without https, mark the text so that the keyboard's own way copies it.
async function copied(button, code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = "Marked: press Ctrl+C";
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}
