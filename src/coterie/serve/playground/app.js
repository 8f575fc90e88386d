// The page: settings at the side, a conversation that each of them answers, and the routing of what is being typed.

import { Answer } from "./answer.js";
import { heldKey, holdKey, models, route, Trouble } from "./api.js";
import { debounced, element } from "./dom.js";
import { inWords, meet, shares, splitBar } from "./experts.js";
import { Setting } from "./setting.js";

const PAUSE = 300; // ms without a key before what is typed is routed, or what was moved is asked again
const THEME = "coterie-theme";
const at = (id) => document.getElementById(id);

let known = []; // models
let settings = []; // one, or two side by side
let turns = []; // {question, places, answers}: by setting
const running = new Map(); // what is being answered, by setting, and how to stop it

async function start() {
  try {
    known = await models();
    at("trouble").hidden = true;
  } catch (error) {
    if (error.status === 401) at("key").focus();
    if (error.wait) setTimeout(start, 1000 * error.wait); // it is still loading, as a rule
    const next = error.wait ? "This page goes on by itself." : error.status === 401 ? "Type a key above." : "";
    return complain(next ? `${error.told}. ${next}` : error.message);
  }
  for (const kind of ["mixture", "method"]) for (const { coterie } of known) if (coterie?.kind === kind) meet(coterie.experts ?? []);
  settings = [];
  at("settings").replaceChildren();
  addSetting();
  at("compare").disabled = false;
  at("send").disabled = false;
}

function addSetting() {
  const setting = new Setting("AB"[settings.length], known, () => preview(), debounced(askAgain, PAUSE));
  if (settings.length) setting.copy(settings[0]);
  settings.push(setting);
  at("settings").append(setting.element);
  preview();
}

function complain(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = !message;
}

// ------------------------------------------------------------------------------------------------ asking

// The conversation before a turn as a setting has it: its own answers, or A's where it gave none.
function messages(place, before, question) {
  const told = turns.slice(0, before).map((turn) => [turn.question, (turn.answers[place] ?? turn.answers[0]).text]);
  const past = told.filter(([, answer]) => answer).flatMap(([asked, answer]) => [
    { role: "user", content: asked },
    { role: "assistant", content: answer },
  ]);
  return [...past, { role: "user", content: question }];
}

function ask() {
  const question = at("question").value.trim();
  if (!question || running.size || !settings.length) return;
  const obstacle = settings.map((setting) => setting.obstacle).find(Boolean);
  complain(obstacle ?? "");
  if (obstacle) return;
  const answers = element("div", { class: "answers" });
  const turn = { question, answers: [], element: element("li", {}, element("p", { class: "question", dir: "auto" }, question), answers) };
  turns.push(turn);
  at("thread").append(turn.element);
  at("opening").hidden = true;
  at("question").value = "";
  routeTyped.cancel();
  forgetMoves();
  at("previews").replaceChildren();
  settings.forEach((_, place) => answerTurn(turn, place));
  turn.element.scrollIntoView({ block: "start" });
}

async function answerTurn(turn, place) {
  running.get(place)?.abort();
  const stopping = new AbortController();
  running.set(place, stopping);
  showRunning();
  const setting = settings[place];
  const answer = new Answer(settings.length > 1 ? `${setting.letter}: ${setting.model.value}` : setting.model.value);
  answer.onWeights = (weights) => setting.follow(weights);
  const shown = turn.element.querySelector(".answers");
  if (turn.answers[place]) turn.answers[place].element.replaceWith(answer.element);
  else shown.append(answer.element);
  turn.answers[place] = answer;
  shown.classList.toggle("two", turn.answers.length > 1);
  const { model, ...rest } = setting.body;
  const ended = await answer.ask({ model, messages: messages(place, turns.indexOf(turn), turn.question), ...rest }, stopping.signal);
  if (running.get(place) !== stopping) return; // asked again meanwhile
  running.delete(place);
  showRunning();
  at("status").textContent = ended ? "The answer is complete." : "The answer has ended early.";
}

function showRunning() {
  at("stop").hidden = !running.size;
  at("send").hidden = running.size > 0;
}

// The last question again, under the weights as they are now.
function askAgain(setting) {
  const place = settings.indexOf(setting);
  complain(setting.obstacle ?? "");
  if (turns.length && place >= 0 && !setting.obstacle) answerTurn(turns.at(-1), place);
}

// Weights that were moved for an answer that is the last one no longer ask for nothing.
const forgetMoves = () => settings.forEach((setting) => setting.moved.cancel());

function clear() {
  forgetMoves();
  for (const stopping of running.values()) stopping.abort();
  turns = [];
  at("thread").replaceChildren();
  at("opening").hidden = false;
  complain("");
}

// ------------------------------------------------------------------------------------- routing while one types

let previewing = new AbortController();

const routeTyped = debounced(async () => {
  previewing.abort();
  previewing = new AbortController();
  const { signal } = previewing;
  const question = at("question").value.trim();
  const asked = question ? settings.filter((setting) => setting.mixes && !setting.own && !setting.obstacle) : [];
  const lines = await Promise.all(asked.map((setting) => routed(setting, question, signal)));
  if (!signal.aborted) at("previews").replaceChildren(...lines);
}, PAUSE);

const preview = () => routeTyped();

async function routed(setting, question, signal) {
  const letter = settings.length > 1 ? `${setting.letter} ` : "";
  const place = settings.indexOf(setting);
  try {
    const body = { model: setting.model.value, messages: messages(place, turns.length, question), coterie: setting.mixture };
    const weights = shares(await route(body, signal));
    if (!signal.aborted) setting.follow(weights);
    return element("p", { class: "preview" }, `${letter}Routing `, splitBar(weights), element("span", { class: "said" }, inWords(weights)));
  } catch (error) {
    return element("p", { class: "preview" }, `${letter}No routing: ${error instanceof Trouble ? error.message : error.name}`);
  }
}

// --------------------------------------------------------------------------------------------- what is pressed

function dress(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

try {
  at("theme").value = localStorage.getItem(THEME) ?? "";
} catch {}
dress(at("theme").value);
at("theme").addEventListener("change", ({ target }) => {
  dress(target.value);
  try {
    localStorage.setItem(THEME, target.value);
  } catch {}
});
at("key").value = heldKey();
at("key").addEventListener("change", ({ target }) => {
  holdKey(target.value);
  start();
});
at("access").addEventListener("submit", (event) => event.preventDefault());
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
at("question").addEventListener("input", preview);
at("stop").addEventListener("click", () => running.forEach((stopping) => stopping.abort()));
at("clear").addEventListener("click", clear);
at("compare").addEventListener("click", ({ target }) => {
  const two = settings.length < 2;
  if (two) addSetting();
  else settings.pop().element.remove();
  running.get(1)?.abort();
  target.setAttribute("aria-pressed", two);
  target.textContent = two ? "Back to one setting" : "Compare two settings";
  preview();
});
start();
