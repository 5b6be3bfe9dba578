// The chat page: a conversation, its controls, and the answer under way.

import { AnswerView, questionNode } from "./answer.js";
import { chat, model, setKey } from "./api.js";
import { byId } from "./dom.js";
import { readSettings, startSettings } from "./settings.js";
import { recall, store } from "./store.js";

const touch = matchMedia("(pointer: coarse)"); // its keyboard has no other key for a new line
const NEAR = 60; // pixels from the end within which the page follows the answer

const ids = ["scroll", "messages", "fault", "composer", "text", "send", "status"];
const [scroll, list, fault, composer, text, send, status] = ids.map(byId);

// Messages of the API. Answers carry what is known about them beside: `end`, `usage`, `ds4jax`.
let messages = [];
let running = null; // aborts the answer under way

// ---- conversation ----

function show() {
  list.replaceChildren(...messages.map((message) => viewOf(message).node));
  byId("welcome").hidden = messages.length > 0;
  keep();
}

function viewOf(message) {
  if (message.role === "user") return { node: questionNode(message, () => edit(message)) };
  return new AnswerView(message, regenerate, () => answer(message));
}

function add(message) {
  messages.push(message);
  const view = viewOf(message);
  list.append(view.node);
  byId("welcome").hidden = true;
  return view;
}

function remove(message, view) {
  messages.splice(messages.indexOf(message), 1);
  view.node.remove();
}

function keep() {
  store("sessionStorage", "conversation", messages);
}

function submit() {
  if (running || !text.value.trim() || !readSettings()) return;
  add({ role: "user", content: text.value });
  text.value = "";
  fit();
  answer();
}

function edit(message) {
  if (running) return;
  text.value = message.content;
  messages.length = messages.indexOf(message);
  fault.hidden = true;
  show();
  fit();
  text.focus();
}

/** Answers the last message of the user again. */
function regenerate() {
  if (running || !readSettings()) return;
  while (messages.at(-1)?.role === "assistant") messages.pop();
  show();
  if (messages.length) answer();
}

/** Lets the model answer, or go on with `begun`. */
async function answer(begun = null) {
  const settings = readSettings();
  if (running || !settings) return;
  const told = messages.filter((message) => message.content || message.reasoning_content).map(wire);
  if (begun) told.at(-1).prefix = true;
  if (settings.system) told.unshift({ role: "system", content: settings.system });
  const message = begun ?? { role: "assistant", content: "", reasoning_content: "" };
  Object.assign(message, { end: null, usage: null, ds4jax: null });
  const view = begun ? redrawn(message) : add(message);
  running = new AbortController();
  begin();
  try {
    const body = { model: byId("model").dataset.id ?? "default", ...settings.body, messages: told };
    for await (const chunk of chat(body, running.signal)) {
      take(message, chunk);
      draw(view);
    }
  } catch (error) {
    message.end = running.signal.aborted ? "stopped" : "failed";
    if (message.end === "failed") {
      report(error, () => (begun ? answer(begun) : regenerate()));
      if (!message.content && !message.reasoning_content) remove(message, view);
    }
  }
  running = null;
  end(view);
}

const wire = ({ role, content, reasoning_content }) => ({ role, content, ...(reasoning_content && { reasoning_content }) });

function redrawn(message) {
  const view = viewOf(message);
  list.lastChild.replaceWith(view.node);
  return view;
}

function take(message, chunk) {
  const [choice] = chunk.choices;
  message.content += choice?.delta.content ?? "";
  message.reasoning_content += choice?.delta.reasoning_content ?? "";
  message.end = choice?.finish_reason ?? message.end;
  message.usage = chunk.usage ?? message.usage;
  message.ds4jax = chunk.ds4jax ?? message.ds4jax;
}

// ---- the answer under way ----

let frame = 0;

/** Shows an answer with the next picture of the screen; the page follows it if its end is in sight. */
function draw(view) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    follow(() => view.show());
  });
}

function follow(change) {
  const near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
  change();
  if (near) toEnd();
}

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
}

function begin() {
  fault.hidden = true;
  send.textContent = "Stop";
  document.body.classList.add("running");
  status.textContent = "The model answers.";
  toEnd();
}

function end(view) {
  cancelAnimationFrame(frame);
  frame = 0;
  send.textContent = "Send";
  document.body.classList.remove("running");
  status.textContent = "The answer has ended.";
  follow(() => view.show());
  keep();
}

function stop() {
  running?.abort();
}

// ---- faults ----

/** Shows what went wrong, and offers to try again; a missing key is asked for. */
function report(error, again) {
  if (error.status === 401) askKey(again);
  fault.querySelector("span").textContent = error.message;
  fault.querySelector("button").onclick = () => {
    fault.hidden = true;
    again();
  };
  fault.hidden = false;
  toEnd();
}

function askKey(again) {
  const dialog = byId("key");
  dialog.querySelector("form").onsubmit = () => {
    const field = dialog.querySelector("input");
    setKey(field.value);
    field.value = "";
    fault.hidden = true;
    again();
  };
  if (!dialog.open) dialog.showModal();
}

async function showModel() {
  try {
    const { id, context_length: context } = await model();
    const about = byId("model");
    about.dataset.id = id;
    about.textContent = `${id} · ${context} tokens`;
    document.title = `${id} · ds4jax`;
  } catch (error) {
    report(error, showModel);
  }
}

// ---- keys and buttons ----

/** As many lines as the message has, up to a limit that the style sets. */
function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else submit();
});
text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // Enter chooses a character
  if (event.key === "Enter" && !event.shiftKey && !touch.matches) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !text.value && !running) {
    const last = messages.findLast((message) => message.role === "user");
    if (last) edit(last);
    event.preventDefault();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
byId("new").addEventListener("click", () => {
  stop();
  messages = [];
  fault.hidden = true;
  show();
  text.focus();
});

window.addEventListener("pagehide", () => {
  stop(); // as a lost connection it would be a fault
  keep();
});

messages = recall("sessionStorage", "conversation") ?? [];
for (const message of messages) if (message.role === "assistant") message.end ??= "stopped";
startSettings();
show();
fit();
toEnd();
showModel();
