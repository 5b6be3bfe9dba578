// How messages look: a question, and an answer as it grows.

import { copyButton, el } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ENDS = {
  length: "Cut off: the limit of tokens is reached.",
  stopped: "Stopped.",
  failed: "Broken off.",
};

/** A message of the user, with a button to change it. */
export function questionNode(message, edit) {
  const actions = el("footer", {}, copyButton(() => message.content));
  actions.append(el("button", { type: "button", class: "small", onclick: edit }, "Edit"));
  return el("article", { class: "question", "aria-label": "You" }, el("div", { class: "plain" }, message.content), actions);
}

/** An answer. Its message may change; `show` then shows it as it has become. */
export class AnswerView {
  /** again, goOn: what the buttons of the last answer do. */
  constructor(message, again, goOn) {
    this.message = message;
    this.thought = el("div", { class: "plain" });
    this.summary = el("summary");
    this.reasoning = el("details", { class: "reasoning" }, this.summary, this.thought);
    this.content = el("div", { class: "markdown" });
    this.markdown = new MarkdownView(this.content);
    this.waiting = el("p", { class: "waiting" }, "Waiting for the model");
    this.note = el("span", { class: "note" });
    this.stats = el("span", { class: "stats" });
    this.goOn = el("button", { type: "button", class: "small last", onclick: goOn }, "Continue");
    const regenerate = el("button", { type: "button", class: "small last", onclick: again }, "Regenerate");
    const copy = copyButton(() => message.content);
    this.actions = el("footer", {}, copy, regenerate, this.goOn, this.note, this.stats);
    const parts = [this.reasoning, this.content, this.waiting, this.actions];
    this.node = el("article", { class: "answer", "aria-label": "Answer" }, ...parts);
    this.show();
  }

  show() {
    const { content, reasoning_content: reasoning, end } = this.message;
    this.reasoning.hidden = !reasoning;
    if (this.thought.textContent !== reasoning) this.thought.textContent = reasoning;
    this.summary.textContent = content || end ? "Reasoning" : "Reasoning …";
    this.markdown.show(content);
    this.waiting.hidden = Boolean(content || reasoning || end);
    this.node.setAttribute("aria-busy", String(!end));
    this.actions.hidden = !end;
    this.goOn.hidden = !["length", "stopped", "failed"].includes(end) || !(content || reasoning);
    this.note.textContent = ENDS[end] ?? "";
    this.stats.textContent = figures(this.message).map((figure) => figure.replaceAll(" ", "\u00a0")).join(" · ");
  }
}

/** What the server said about the work: its own figures, and the counts of the API. */
function figures({ ds4jax, usage }) {
  if (!ds4jax || !usage) return [];
  const { tokens_per_second: rate, time_to_first_token_s: first, drafted, accepted } = ds4jax;
  const { prompt_tokens: prompt, prompt_tokens_details: details, completion_tokens: tokens } = usage;
  const found = [`${rate.toFixed(1)} tokens/s`, `first token after ${first.toFixed(2)} s`, `${tokens} tokens`];
  if (drafted) found.push(`${accepted} of ${drafted} drafts accepted (${Math.round((100 * accepted) / drafted)}%)`);
  found.push(`prompt ${prompt} tokens, ${details.cached_tokens} cached`);
  return found;
}
