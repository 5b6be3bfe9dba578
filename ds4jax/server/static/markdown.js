// Markdown as models write it: blocks. Text in, nodes out; what is no Markdown is shown as written.

import { copyButton, el } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 8; // levels of quotations and lists
// None of these may need more than linear time, whatever a model writes.
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const TABLE = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
const DISPLAYED = [
  { open: /^\s*\\\[/, close: /\\\]\s*$/ },
  { open: /^\s*\$\$/, close: /\$\$\s*$/ },
];

/** Shows a text that grows: what has not changed since the last time stays as it is. */
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.sources = [];
  }

  show(text) {
    const lines = text.split("\n");
    const found = blocks(lines, 0);
    const sources = found.map((block) => lines.slice(block.start, block.end).join("\n"));
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same += 1;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...found.slice(same).map((block) => block.make()));
    this.sources = sources;
  }
}

/** Nodes of a text. */
const render = (lines, depth) => blocks(lines, depth).map((block) => block.make());

/** Blocks of lines: the lines from `start` to `end`, and `make` for the node. */
function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = next(lines, at, depth);
    found.push({ ...block, start: at });
    at = block.end;
  }
  return found;
}

function next(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const displayed = DISPLAYED.find(({ open }) => open.test(line));
  if (displayed) return formula(lines, at, displayed);
  const heading = HEADING.exec(line);
  if (heading) {
    // Headings of an answer stand below those of the page.
    const tag = `h${Math.min(6, heading[1].length + 2)}`;
    const text = (heading[2] ?? "").trim().replace(/(^|\s)#+$/, "");
    return { end: at + 1, make: () => el(tag, {}, ...inline(text)) };
  }
  if (RULE.test(line)) return { end: at + 1, make: () => el("hr") };
  if (depth < DEEPEST && QUOTE.test(line)) return quotation(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

/** The line number of the first line from `at` on that `test` is true of, or the number of lines. */
function until(lines, at, test) {
  while (at < lines.length && !test(lines[at], at)) at += 1;
  return at;
}

function code(lines, at, [, indent, fence, about]) {
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  const close = until(lines, at + 1, (line) => closing.test(line));
  const make = () => {
    const strip = new RegExp(`^ {0,${indent.length}}`);
    const text = lines.slice(at + 1, close).map((line) => line.replace(strip, "")).join("\n");
    const bar = el("div", { class: "code-bar" }, el("span", {}, about.trim().split(/\s/)[0]), copyButton(() => text));
    return el("div", { class: "code" }, bar, el("pre", { tabindex: "0" }, el("code", {}, text)));
  };
  return { end: Math.min(close + 1, lines.length), make };
}

/** A formula on lines of its own, shown as written. */
function formula(lines, at, { open, close }) {
  const first = lines[at].replace(open, "");
  const end = close.test(first) ? at : until(lines, at + 1, (line) => close.test(line) || !line.trim());
  const last = Math.min(end + 1, lines.length);
  return { end: last, make: () => el("div", { class: "math", tabindex: "0" }, lines.slice(at, last).join("\n").trim()) };
}

function quotation(lines, at, depth) {
  const end = until(lines, at, (line) => !QUOTE.test(line));
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { end, make: () => el("blockquote", {}, ...render(inner, depth + 1)) };
}

function list(lines, at, depth) {
  const [, margin, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    const isNext = item && item[1].length < margin.length + 2 && /\d/.test(item[2]) === ordered;
    if (!isNext || RULE.test(lines[at])) break;
    const end = until(lines, at + 1, (line, i) => {
      if (!line.trim() || indentation(line) >= item[1].length + 2) return false;
      return !lines[i - 1].trim() || ITEM.test(line) || interrupts(lines, i);
    });
    // Models indent what belongs to an item by two spaces or more, whatever the width of its mark.
    const width = item[1].length + item[2].length + Math.min(item[3].length || 1, 4);
    const first = lines.slice(at + 1, end).find((line) => line.trim());
    const strip = new RegExp(`^\\s{0,${Math.min(width, first ? indentation(first) : 0)}}`);
    items.push([item[4], ...lines.slice(at + 1, end).map((line) => line.replace(strip, ""))]);
    at = end;
  }
  const make = () => {
    const nodes = items.map(([first, ...rest]) => {
      const box = first.replace(/^\[ \] /, "☐ ").replace(/^\[[xX]\] /, "☑ ");
      return el("li", {}, ...render([box, ...rest], depth + 1));
    });
    return ordered ? el("ol", { start: parseInt(mark, 10) }, ...nodes) : el("ul", {}, ...nodes);
  };
  return { end: at, make };
}

function indentation(line) {
  return line.length - line.trimStart().length;
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE.test(lines[at + 1].trim());
}

function table(lines, at) {
  const end = until(lines, at + 2, (line) => !line.includes("|"));
  const cells = (line) => {
    const inner = line.trim().replace(/^\||(?<!\\)\|$/g, "");
    return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  };
  const make = () => {
    const sides = cells(lines[at + 1]).map((rule) => {
      if (!rule.endsWith(":")) return "left";
      return rule.startsWith(":") ? "center" : "right";
    });
    const row = (line, tag) =>
      el("tr", {}, ...cells(line).slice(0, sides.length).map((cell, i) => el(tag, { class: sides[i] }, ...inline(cell))));
    const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
    const whole = el("table", {}, el("thead", {}, row(lines[at], "th")), el("tbody", {}, ...body));
    return el("div", { class: "table", tabindex: "0" }, whole);
  };
  return { end, make };
}

/** Whether a line ends the paragraph before it. */
function interrupts(lines, at) {
  const line = lines[at];
  if ([FENCE, HEADING, RULE, QUOTE].some((start) => start.test(line))) return true;
  const item = ITEM.exec(line);
  if (item?.[4] && !(parseInt(item[2], 10) > 1)) return true; // a sentence may go on with "1984."
  return DISPLAYED.some(({ open }) => open.test(line)) || isTable(lines, at);
}

function paragraph(lines, at, depth) {
  const end = until(lines, at + 1, (line, i) => !line.trim() || (depth < DEEPEST && interrupts(lines, i)));
  const text = lines.slice(at, end).map((line) => line.trim().replace(/\\$/, "")).join("\n");
  return { end, make: () => el("p", {}, ...inline(text)) };
}
