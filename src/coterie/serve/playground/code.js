// What was asked, as a shell and as a Python program would ask it. A key is read from the environment, never shown.

import { base } from "./api.js";

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function curl(body, keyed) {
  return [
    `curl ${quoted(new URL("chat/completions", base).href)}`,
    ...(keyed ? [`-H "Authorization: Bearer $COTERIE_API_KEY"`] : []),
    `-H 'Content-Type: application/json'`,
    `-d ${quoted(JSON.stringify(body, null, 2))}`,
  ].join(" \\\n  ");
}

export function python(body, keyed) {
  const { coterie, ...fields } = body;
  const given = Object.entries(fields).map(([name, value]) => `    ${name}=${literal(value, "    ")},\n`);
  if (coterie) given.push(`    extra_body={"coterie": ${literal(coterie, "    ")}},\n`);
  const key = keyed ? `os.environ["COTERIE_API_KEY"]` : `"none"`;
  const last = coterie ? "choice.model_extra[\"coterie\"][\"weights\"]" : null;
  return (
    (keyed ? "import os\n\n" : "") +
    `from openai import OpenAI\n\n` +
    `client = OpenAI(base_url=${literal(base.href.replace(/\/$/, ""))}, api_key=${key})\n` +
    `answer = client.chat.completions.create(\n${given.join("")})\n` +
    `choice = answer.choices[0]\nprint(choice.message.content)\n` +
    (last ? `print(${last})\n` : "")
  );
}

// A JSON value as Python writes it; a JSON string is a Python string too.
function literal(value, indent = "") {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const parts = Array.isArray(value)
    ? value.map((part) => literal(part, `${indent}    `))
    : Object.entries(value).map(([name, part]) => `${JSON.stringify(name)}: ${literal(part, `${indent}    `)}`);
  const line = open + parts.join(", ") + close;
  if (line.length + indent.length <= 88 && !line.includes("\n")) return line;
  return `${open}\n${parts.map((part) => `${indent}    ${part},\n`).join("")}${indent}${close}`;
}
