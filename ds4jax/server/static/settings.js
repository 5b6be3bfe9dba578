// Settings of requests and of the page. They stay in this browser; an empty field is left to the server.

import { byId } from "./dom.js";
import { recall, store } from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

const dialog = byId("settings");
const form = dialog.querySelector("form");

/** Brings the settings back and watches them. */
export function startSettings() {
  const kept = recall("localStorage", "settings") ?? {};
  for (const field of fields()) field.value = kept[field.name] ?? "";
  form.addEventListener("input", keep);
  form.addEventListener("reset", () => setTimeout(keep)); // the fields change after the event
  byId("open-settings").addEventListener("click", () => dialog.showModal());
  dress();
}

/** The system prompt, and the fields of a request. Null if a field is wrong: it is then shown. */
export function readSettings() {
  if (!form.checkValidity()) {
    if (!dialog.open) dialog.showModal();
    form.reportValidity();
    return null;
  }
  const body = {};
  for (const name of NUMBERS) if (form.elements[name].value) body[name] = Number(form.elements[name].value);
  const thinking = form.elements.thinking.value;
  if (thinking) {
    body.thinking = { type: thinking === "none" ? "disabled" : "enabled" };
    body.reasoning_effort = thinking;
  }
  return { system: form.elements.system.value, body };
}

function fields() {
  return [...form.elements].filter((field) => field.name);
}

function keep() {
  store("localStorage", "settings", Object.fromEntries(fields().map((field) => [field.name, field.value])));
  dress();
}

function dress() {
  const wanted = form.elements.appearance.value;
  if (wanted) document.documentElement.dataset.appearance = wanted;
  else delete document.documentElement.dataset.appearance;
}
