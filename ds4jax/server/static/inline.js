// Markdown within a line of thought: code, links, emphasis, formulas. Text in, nodes out; no HTML is ever parsed.

import { el } from "./dom.js";

// What lies deeper or is longer is shown as written: whatever a model writes, showing it takes little time.
const DEEPEST = 8; // levels of nesting
const LONGEST = 20_000; // characters of a paragraph

// What is not searched for emphasis.
const ATOM = new RegExp(
  [
    /(?<!`)(?<ticks>`{1,9})(?!`)(?<code>[^]{1,4000}?)(?<!`)\k<ticks>(?!`)/,
    /(?<math>\\\([^]{1,2000}?\\\)|\\\[[^]{1,2000}?\\\]|\$\$[^]{1,2000}?\$\$)/,
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /!?\[(?<label>(?:[^[\]\\]|\\[^]|\[[^[\]]{0,200}\]){0,1000})\]\(\s{0,9}<?(?<target>[^\s()<>]{0,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500}){0,3})>?(?:\s{1,9}"[^"]{0,500}")?\s{0,9}\)/,
    /<?(?<url>\bhttps?:\/\/[^\s<>]{1,2000})>?/,
  ]
    .map((part) => part.source)
    .join("|"),
  "g",
);

const NO_WORD = "(?![\\p{L}\\p{N}_]|\\.\\p{L})"; // nor the rest of a name, as of __init__.py
const MARKS = [
  { mark: "***", tags: ["strong", "em"], close: /(?<![\s*])\*\*\*(?!\*)/g },
  { mark: "**", tags: ["strong"], close: /(?<!\s)\*\*(?!\*(?!\*))/g },
  { mark: "*", tags: ["em"], close: /(?<![\s*])\*(?!\*)/g },
  { mark: "__", tags: ["strong"], close: new RegExp(`(?<!\\s)__${NO_WORD}`, "gu"), words: true },
  { mark: "_", tags: ["em"], close: new RegExp(`(?<![\\s_])_${NO_WORD}`, "gu"), words: true },
  { mark: "~~", tags: ["del"], close: /(?<!\s)~~(?!~)/g },
];

/** Nodes of a text. */
export function inline(text, depth = 0) {
  if (depth > DEEPEST || text.length > LONGEST) return [text];
  const atoms = new Map();
  const masked = text.replace(ATOM, (source, ...rest) => {
    const [at, , groups] = rest.slice(-3);
    const length = groups.url ? trimmed(source).length : source.length;
    atoms.set(at, { end: at + length, nodes: () => atom(source.slice(0, length), groups, depth) });
    return "x".repeat(length) + source.slice(length); // neither a mark nor white space
  });
  return emphasis(text, masked, atoms, 0, text.length, depth);
}

function emphasis(text, masked, atoms, start, end, depth) {
  const nodes = [];
  const hopeless = new Set(); // marks that nothing closes from here on
  let plain = start; // beginning of text not yet among the nodes
  let at = start;
  const flush = () => at > plain && nodes.push(text.slice(plain, at));
  while (at < end) {
    const found = atoms.get(at);
    if (found) {
      flush();
      nodes.push(...found.nodes());
      plain = at = found.end;
      continue;
    }
    const opened = depth < DEEPEST && "*_~".includes(masked[at]) && opening(masked, at, end, hopeless);
    if (opened) {
      flush();
      const inner = emphasis(text, masked, atoms, at + opened.mark.length, opened.close, depth + 1);
      nodes.push(opened.tags.reduceRight((content, tag) => [el(tag, {}, ...content)], inner)[0]);
      plain = at = opened.close + opened.mark.length;
    } else {
      at += 1;
    }
  }
  flush();
  return nodes;
}

/** The mark that opens emphasis here and the place where it closes, if there is one. */
function opening(masked, at, end, hopeless) {
  for (const { mark, tags, close, words } of MARKS) {
    const after = masked[at + mark.length];
    if (hopeless.has(mark) || !masked.startsWith(mark, at) || after === undefined || /\s/.test(after)) continue;
    if (words && at > 0 && /[\p{L}\p{N}_]/u.test(masked[at - 1])) continue;
    close.lastIndex = at + mark.length + 1;
    const closing = close.exec(masked);
    if (closing && closing.index + mark.length <= end) return { mark, tags, close: closing.index };
    hopeless.add(mark);
  }
  return null;
}

function atom(source, { code, math, escaped, label, target, url }, depth) {
  if (code !== undefined) return [el("code", {}, code.replace(/\n/g, " ").replace(/^ (.*[^ ].*) $/, "$1"))];
  if (math !== undefined) return [el("span", { class: "math" }, math)];
  if (escaped !== undefined) return [escaped];
  if (url !== undefined) {
    const bare = source.replace(/^<|>$/g, "");
    return link(bare, [bare]);
  }
  // A picture would be a request to somewhere else: it becomes a link.
  const content = label.trim() ? inline(label, depth + 1) : [target];
  return link(target, content) ?? [source];
}

/** A link to another site, opened beside the chat; null for other kinds of addresses. */
function link(target, content) {
  const address = URL.canParse(target) ? new URL(target) : null;
  if (!["http:", "https:", "mailto:"].includes(address?.protocol)) return null;
  const attributes = { href: address.href, title: address.href, target: "_blank", rel: "noopener noreferrer" };
  return [el("a", attributes, ...content)];
}

/** An address as it stands in a sentence, without what ends the sentence. */
function trimmed(source) {
  if (source.startsWith("<") && source.endsWith(">")) return source;
  const address = source.replace(/[>.,:;!?'"*_~\]]+$/, "");
  return address.endsWith(")") && !address.includes("(") ? address.slice(0, -1) : address;
}
